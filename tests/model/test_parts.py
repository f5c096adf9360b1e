"""Parts of a streamed model called by themselves: towers, layers, and whatever is inside of layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree

from airstream import UnsupportedError
from airstream.model.absent import Absent
from tests.conftest import STREAMING, least_memory, stream
from tests.matrix.cases import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, SEQ2SEQ_LM
from tests.matrix.examine import write
from tests.matrix.inputs import inputs_of, text
from tests.stand_ins.threads import InThread

KINDS = {
    "llama": CAUSAL_LM,
    "qwen3_moe": CAUSAL_LM,
    "gpt2": CAUSAL_LM,
    "deepseek_v3": CAUSAL_LM,
    "t5": SEQ2SEQ_LM,
    "bart": SEQ2SEQ_LM,
    "llava": IMAGE_TEXT_TO_TEXT,
    "qwen2_vl": IMAGE_TEXT_TO_TEXT,
}


class Seen(NamedTuple):
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def watch(model: Any, inputs: Mapping[str, Any]) -> dict[str, Seen]:
    """What each module of `model` is called with in a pass, and what it gives: the first call of each."""
    calls: dict[str, Seen] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.setdefault(name, Seen(*map(copy.deepcopy, (args, kwargs, output))))

        return hook

    handles = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in model.named_modules() if name]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def assert_same(one: Any, other: Any, name: str) -> None:
    mine, theirs = (
        [leaf for leaf in pytree.tree_leaves(each) if isinstance(leaf, torch.Tensor)] for each in (one, other)
    )
    assert len(mine) == len(theirs) > 0, name
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True)), name


@pytest.mark.parametrize("kept", [0, 0.5], ids=["streamed", "half of it stays"])
@pytest.mark.parametrize("model_type", KINDS)
def test_every_module_alone_gives_what_it_gives_in_a_pass(tmp_path: Path, model_type: str, kept: float) -> None:
    auto_class = KINDS[model_type]
    write(auto_class, model_type, tmp_path)
    reference = getattr(transformers, auto_class).from_pretrained(tmp_path).eval()
    inputs = inputs_of(auto_class, model_type, reference)[0]
    calls = watch(reference, inputs)
    weights = sum(parameter.nbytes for parameter in reference.parameters())
    budget = least_memory(tmp_path, **STREAMING)["cpu"] + int(kept * weights)
    with stream(tmp_path, max_memory=budget) as model:
        modules = dict(model.named_modules())
        names = [name for name in calls if name in modules]
        inside = [name for name in names if any(name.startswith(f"{unit}.") for unit in units(model))]
        assert len(inside) > 10
        for name in (*names, *reversed(names)):
            call = copy.deepcopy(calls[name])
            with torch.no_grad():
                assert_same(modules[name](*call.args, **call.kwargs), call.output, name)
            assert not model._engine.gate.turns.is_taken
        assert nothing_is_bound(model)
        with torch.no_grad():
            assert_same(model(**inputs).logits, reference(**inputs).logits, "all")


def units(model: Any) -> list[str]:
    return [unit for batch in model.plan.batches for unit in batch.units]


def nothing_is_bound(model: Any) -> bool:
    resident = {name for batch in model.plan.batches for name in batch.resident}
    streamed = (
        parameter
        for unit in units(model)
        for name, parameter in model.get_submodule(unit).named_parameters()
        if f"{unit}.{name}" not in resident
    )
    return all(isinstance(parameter, Absent) for parameter in streamed)


@pytest.mark.parametrize("place", ["layers.2", "layers.2.mlp", "layers.2.mlp.up_proj"])
def test_an_error_in_a_part_leaves_nothing_behind(tmp_path: Path, place: str) -> None:
    write(CAUSAL_LM, "llama", tmp_path)
    with stream(tmp_path) as model:
        part = model.model.get_submodule(place)
        for _ in range(2):
            with pytest.raises((RuntimeError, ValueError, TypeError)) as error, torch.no_grad():
                part(torch.ones(1, 2, 7))
            assert not isinstance(error.value, UnsupportedError)
            assert nothing_is_bound(model)
            assert not model._engine.gate.turns.is_taken


def test_a_part_computes_no_gradients_and_says_so(tmp_path: Path) -> None:
    write(CAUSAL_LM, "llama", tmp_path)
    with stream(tmp_path) as model:
        hidden = torch.ones(1, 2, model.config.hidden_size, requires_grad=True)
        for place in ("layers.1.mlp", "layers.1.mlp.up_proj"):
            with torch.enable_grad(), pytest.raises(UnsupportedError, match="no_grad"):
                model.model.get_submodule(place)(hidden)
            assert not model._engine.gate.turns.is_taken


def test_modules_whose_weights_stay_are_called_without_a_detour(tmp_path: Path) -> None:
    """Hooks on every module would be felt in a model that is in memory."""
    write(CAUSAL_LM, "llama", tmp_path)
    with stream(tmp_path, max_memory="1GiB") as model:
        model(**text(model))
        model(**text(model))
        hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
        assert set(hooked) == {*units(model), "model.embed_tokens", "model.norm"}  # and what is outside the layers


GRADIENT_CALLS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "by position": lambda layer, x: layer.mlp(x),
    "by keyword": lambda layer, x: layer.mlp(x=x),
    "a part's part": lambda layer, x: layer.mlp.up_proj(input=x),
    "in a tuple": lambda layer, x: layer(x.detach(), position_embeddings=(x[..., :16], x[..., :16])),
}


@pytest.mark.parametrize("call", GRADIENT_CALLS.values(), ids=GRADIENT_CALLS)
def test_inputs_that_ask_for_a_gradient_are_seen_wherever_they_stand(
    tmp_path: Path, call: Callable[[Any, torch.Tensor], Any]
) -> None:
    """The graph would keep the ring's memory, which holds other weights when it is walked back."""
    write(CAUSAL_LM, "llama", tmp_path)
    with stream(tmp_path) as model:
        hidden = torch.ones(1, 2, model.config.hidden_size, requires_grad=True)
        with torch.enable_grad(), pytest.raises(UnsupportedError, match="no_grad"):
            call(model.model.layers[1], hidden)
        assert not model._engine.gate.turns.is_taken


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
def test_so_is_an_adapter_that_is_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    write(CAUSAL_LM, "llama", tmp_path)
    with stream(tmp_path) as model:
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
        hidden = torch.ones(1, 2, model.config.hidden_size)
        with torch.enable_grad(), pytest.raises(UnsupportedError, match="no_grad"):
            model.model.layers[1].mlp(hidden)
        with torch.no_grad():
            model.model.layers[1].mlp(hidden)


def test_a_hook_that_switches_autograd_on_records_no_part(tmp_path: Path) -> None:
    write(CAUSAL_LM, "llama", tmp_path)
    with stream(tmp_path) as model:

        def call_again(module: nn.Module, args: Any, output: Any) -> None:
            with torch.enable_grad():
                module.up_proj(args[0])

        model.model.layers[1].mlp.register_forward_hook(call_again)
        with pytest.raises(UnsupportedError, match="computes no gradients"):
            model(**text(model))


INTERRUPTED = ("layers.1", "layers.1.mlp", "layers.1.mlp.up_proj", "norm")


@pytest.mark.parametrize("budget", [{}, {"max_memory": "1GiB"}], ids=["streamed", "resident"])
@pytest.mark.parametrize("path", INTERRUPTED)
def test_a_part_can_be_called_again_after_an_interrupt(tmp_path: Path, path: str, budget: dict[str, Any]) -> None:
    """In the same thread, before the whole model runs: the turn of the interrupted call is over."""
    write(CAUSAL_LM, "llama", tmp_path)
    with stream(tmp_path, **budget) as model:
        part = model.model.get_submodule(path)
        hidden = torch.ones(1, 2, model.config.hidden_size)
        position = model.model.rotary_emb(hidden, torch.arange(2)[None])
        arguments = {"position_embeddings": position} if path == "layers.1" else {}
        expected = part(hidden, **arguments)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        for register in (part.register_forward_pre_hook, part.register_forward_hook):
            handle = register(interrupt)
            with pytest.raises(KeyboardInterrupt):
                part(hidden, **arguments)
            handle.remove()
            assert torch.equal(part(hidden, **arguments)[0], expected[0])
            assert not model._engine.gate.turns.is_taken
            handle = register(interrupt)
            with pytest.raises(KeyboardInterrupt):
                part(hidden, **arguments)
            handle.remove()
            model.model.norm(hidden)  # has a turn of its own, and nothing to recover
            model(**text(model))
            assert not model._engine.gate.turns.is_taken


def test_a_module_that_outlives_the_interrupt_of_a_part_keeps_no_turn(tmp_path: Path) -> None:
    """It is still inside a call of a module, but not of the part's."""
    write(CAUSAL_LM, "llama", tmp_path)
    with stream(tmp_path) as model:
        inputs = text(model)

        class Patient(nn.Module):
            def forward(self, hidden: torch.Tensor) -> Any:
                try:
                    model.model.layers[1].mlp(hidden)
                except KeyboardInterrupt:
                    return InThread(lambda: model(**inputs)).finish().error

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        error = Patient()(torch.ones(1, 2, model.config.hidden_size))
        assert isinstance(error, KeyboardInterrupt), "the model's own pass meets the hook, too: it was let in"
