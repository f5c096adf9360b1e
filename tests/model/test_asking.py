"""Weights ask for a gradient while the model computes as those of transformers would: torch rounds otherwise else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from airstream import UnsupportedError
from airstream.model.weight import Weight
from tests.conftest import Resident, WriteTiny, stream
from tests.stand_ins.tiny_models import VOCAB_SIZE

FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.randint(3, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(1))
HEAD = "lm_head.weight"
BUDGETS: Mapping[str, dict[str, Any]] = {"streamed": {}, "resident": {"max_memory": "1GiB"}}


@pytest.fixture(params=BUDGETS.values(), ids=BUDGETS)
def model(request: pytest.FixtureRequest, tiny: WriteTiny) -> Any:
    with stream(tiny("llama", FP32), **request.param) as model:
        yield model


def torch_sees(weight: torch.Tensor) -> bool:
    return bool(torch.Tensor.requires_grad.__get__(weight))  # type: ignore[attr-defined]


def freeze_head(model: Any) -> None:
    model.lm_head.weight.requires_grad = False


FROZEN: Mapping[str, Callable[[Any], Any]] = {
    "as it comes": lambda model: None,
    "all": lambda model: model.requires_grad_(False),
    "a layer": lambda model: model.model.layers[0].requires_grad_(False),
    "the head": freeze_head,
}
"""What users say of gradients."""


def flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def scores(model: Any) -> torch.Tensor:
    """Of the first token of three sequences, whose last positions lie apart, and of two more."""
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "output_scores": True}
    return torch.stack(model.generate(IDS, return_dict_in_generate=True, **options).scores)


@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_a_batch_has_the_bits_of_transformers(
    tiny: WriteTiny, budget: dict[str, Any], dtype: torch.dtype, freeze: Callable[[Any], Any]
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny("llama", dtype), dtype=dtype)
    with stream(tiny("llama", dtype), **budget) as model:
        for each in (reference, model):
            freeze(each)
        assert flags(model) == flags(reference)
        assert torch.equal(scores(model), scores(reference))
        assert flags(model) == flags(reference)


@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN)
def test_torch_sees_what_was_said_while_the_model_computes(model: Any, freeze: Callable[[Any], Any]) -> None:
    """In whatever state the weights are when it is said."""
    seen: dict[str, bool] = {}

    def look(name: str, module: nn.Module, *_: Any) -> None:
        for leaf, parameter in module.named_parameters(recurse=False):
            seen[f"{name}.{leaf}"] = torch_sees(parameter)

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(look, name))
    for _ in range(2):
        model(IDS)
        freeze(model)
    model(IDS)
    del seen["model.embed_tokens.weight"]  # rows are looked up, whatever stands there
    assert seen == {name: asks for name, asks in flags(model).items() if "embed_tokens" not in name}


def test_between_calls_no_arithmetic_with_a_weight_is_recorded(model: Any) -> None:
    for _ in range(2):
        model(IDS)
        weights = [each for each in model.parameters() if isinstance(each, Weight)]
        assert weights
        assert not any(torch_sees(each) for each in weights)
        assert not (weights[0] * 2).requires_grad


CALLS: Mapping[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "the head": lambda model, hidden: model.lm_head(hidden[:, -1:]),
    "a layer's part": lambda model, hidden: model.model.layers[1].mlp(hidden[:, -1:]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_part_that_is_called_alone_has_the_bits_too(
    model: Any, resident: Resident, call: Callable[[Any, torch.Tensor], torch.Tensor]
) -> None:
    """Before the first pass: a part of a layer that is wholly in memory is called without a detour from then on."""
    hidden = torch.randn(3, 12, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    reference = resident("llama", FP32, FP32)
    with torch.no_grad():
        assert torch.equal(call(model, hidden), call(reference, hidden))
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_with_gradients_around_it_it_gives_none(model: Any, call: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    model(IDS)
    assert not call(model, torch.ones(3, 12, model.config.hidden_size)).requires_grad
    assert not model(IDS).logits.requires_grad


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_autocast_keeps_none_of_the_weights(
    tiny: WriteTiny, resident: Resident, budget: dict[str, Any], dtype: torch.dtype
) -> None:
    """It keeps what it has cast of weights that ask, as long as it lasts: of a ring, the values of the first pass."""
    reference = resident("llama", dtype, dtype)
    with stream(tiny("llama", dtype), **budget) as model, torch.autocast("cpu", dtype=BF16):
        for _ in range(2):
            assert torch.equal(scores(model), scores(reference))


def test_copies_ask_as_those_of_transformers_do(model: Any) -> None:
    model(IDS)
    freeze_head(model)
    copies = {name: copy.deepcopy(each) for name, each in model.named_parameters()}
    assert {name: each.requires_grad for name, each in copies.items()} == flags(model)
    assert all(torch_sees(each) is (name != HEAD) for name, each in copies.items())


def test_it_cannot_be_asked_for_again(model: Any) -> None:
    freeze_head(model)
    for ask in (lambda weight: weight.requires_grad_(), lambda weight: setattr(weight, "requires_grad", True)):
        with pytest.raises(UnsupportedError, match="Fine-tune"):
            ask(model.lm_head.weight)


def test_what_stays_outside_the_layers_asks_when_it_is_called_alone(model: Any) -> None:
    """As projectors are, which have no layers to take a turn for them."""
    seen: list[bool] = []
    norm, hidden = model.model.norm, torch.ones(1, 3, model.config.hidden_size)
    norm.register_forward_pre_hook(lambda module, _: seen.append(torch_sees(module.weight)))
    with torch.no_grad():
        norm(hidden)
    assert not norm(hidden).requires_grad
    model(IDS)
    assert seen == [True, False, True]
    assert not torch_sees(norm.weight)


@pytest.mark.parametrize("path", ["model.layers.1", "model.layers.1.mlp", "model.norm"])
def test_an_interrupted_call_of_a_part_is_not_taken_for_one_under_way(model: Any, path: str) -> None:
    """Its end was not seen. Then the module runs in a pass of the whole model, whose turn would end there."""
    part, hidden = model.get_submodule(path), torch.ones(1, 3, model.config.hidden_size)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = part.register_forward_pre_hook(interrupt)
    position = model.model.rotary_emb(hidden, torch.arange(3)[None])
    with pytest.raises(KeyboardInterrupt):
        part(hidden, **({"position_embeddings": position} if path == "model.layers.1" else {}))
    handle.remove()
    seen: list[bool] = []
    model.lm_head.register_forward_pre_hook(lambda module, _: seen.append(torch_sees(module.weight)))
    model(IDS)
    assert seen == [True]
    assert not any(torch_sees(each) for each in model.parameters() if isinstance(each, Weight))
