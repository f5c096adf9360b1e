"""The memory of a streamed weight holds another one next: what somebody takes meanwhile has its values, or none."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from airstream import UnsupportedError
from airstream.model.absent import Absent
from airstream.model.stored import Stored
from airstream.model.weight import Loan, Weight, weight_of
from tests.conftest import Resident, WriteTiny, stream
from tests.stand_ins.tiny_models import VOCAB_SIZE

FP32 = torch.float32
IDS = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(1))
PATH = "model.layers.1.mlp.up_proj"
NAME = f"{PATH}.weight"


@pytest.fixture
def model(tiny: WriteTiny) -> Any:
    with stream(tiny("llama", FP32)) as model:
        yield model


@pytest.fixture
def values(resident: Resident) -> torch.Tensor:
    return resident("llama", FP32, FP32).get_parameter(NAME).detach()


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def in_a_hook(model: Any, take: Callable[[Any], Any]) -> Any:
    """What `take` gives of the module, whose weights are in place, once the pass is over."""
    taken: list[Any] = []
    module = model.get_submodule(PATH)
    handle = module.register_forward_hook(lambda *_: taken.append(take(module)))
    model(IDS)
    handle.remove()
    return taken[0]


COPIES: Mapping[str, Callable[[Any], torch.Tensor]] = {
    "clone": lambda weight: weight.clone(),
    "clone of a twin": lambda weight: weight.detach().clone(),
    "clone of its data": lambda weight: weight.data.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "torch.save": saved,
}


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_weight_that_a_hook_kept_has_its_values(
    model: Any, values: torch.Tensor, made: Callable[[Any], torch.Tensor]
) -> None:
    weight = in_a_hook(model, lambda module: module.weight)
    assert isinstance(weight, Weight)
    for _ in range(2):
        assert torch.equal(made(weight), values)
        model(IDS)


def test_the_weight_itself_has_no_numbers_any_more(model: Any, values: torch.Tensor) -> None:
    weight = in_a_hook(model, lambda module: module.weight)
    assert weight.shape == values.shape
    assert weight.isnan().all()
    assert in_a_hook(model, lambda module: torch.equal(module.weight, values))


@pytest.mark.parametrize("place", ["", "model", "model.layers.1", PATH])
def test_a_state_dict_of_a_hook_has_the_checkpoints_values(model: Any, resident: Resident, place: str) -> None:
    state = in_a_hook(model, lambda _: model.get_submodule(place).state_dict())
    assert not any(isinstance(each, Weight) and each.is_lent for each in state.values())
    expected = resident("llama", FP32, FP32).get_submodule(place).state_dict()
    for each in (copy.deepcopy(state), saved(state)):
        assert each.keys() == expected.keys()
        assert all(torch.equal(each[name], expected[name]) for name in expected)


def test_so_has_one_that_another_thread_takes(model: Any, resident: Resident) -> None:
    """In the middle of a layer of the thread that computes."""
    inside, taken = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert taken.wait(30)

    handle = model.get_submodule(PATH).register_forward_hook(wait)
    thread = threading.Thread(target=model, args=(IDS,))
    thread.start()
    assert inside.wait(30)
    state = model.state_dict()
    parameter = dict(model.named_parameters())[NAME]
    taken.set()
    thread.join()
    handle.remove()
    expected = resident("llama", FP32, FP32).state_dict()
    assert isinstance(state[NAME], Absent)
    assert torch.equal(parameter.clone(), expected[NAME])
    copied = copy.deepcopy(state)
    assert all(torch.equal(copied[name], expected[name]) for name in expected)


def test_what_stays_is_copied_where_it_lies(tiny: WriteTiny, values: torch.Tensor) -> None:
    with stream(tiny("llama", FP32), max_memory="1GiB") as model:
        weight = in_a_hook(model, lambda module: module.weight)
        assert not weight.is_lent
        assert torch.equal(weight, values)
        assert torch.equal(weight.clone(), values)


KEPT: Mapping[str, Callable[[Any], torch.Tensor]] = {
    "itself": lambda weight: weight,
    "twin": lambda weight: weight.detach(),
    "data": lambda weight: weight.data,
    "slice": lambda weight: weight[1:],
    "flat": lambda weight: weight.view(-1),
}
LATE = "a weight of 'model.layers.0' has been changed after its layer's call"


def calls(model: Any) -> Mapping[str, Callable[[], torch.Tensor]]:
    """Calls in which layer 1 computes, and layer 0 does not need to."""
    hidden = torch.randn(2, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    layer = model.model.layers[1]
    rotary = model.model.rotary_emb(hidden, torch.arange(3)[None])
    return {
        "model": lambda: model(IDS).logits,
        "base model": lambda: model.model(IDS).last_hidden_state,
        "layer": lambda: layer(hidden, position_embeddings=rotary),
        "part": lambda: layer.mlp(hidden),
    }


@torch.no_grad()
@pytest.mark.parametrize("call", ["model", "base model", "layer", "part"])
@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_who_writes_to_what_was_lent_is_refused_in_that_call(
    model: Any, resident: Resident, keep: Callable[[Any], torch.Tensor], call: str
) -> None:
    """By then the memory holds a weight of another layer, which computed with zeros."""
    kept: list[torch.Tensor] = []
    layers = model.model.layers
    takes = layers[0].mlp.register_forward_hook(lambda module, *_: kept.append(keep(module.up_proj.weight)))
    model(IDS)
    takes.remove()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model._engine, "_check_between", lambda: None)  # what is noticed, is at the end of the call

        def write(*_: Any) -> None:
            kept[0].zero_()

        writes = layers[1].mlp.gate_proj.register_forward_pre_hook(write)
        with pytest.raises(UnsupportedError, match=LATE):
            calls(model)[call]()
        writes.remove()
    assert torch.equal(calls(model)[call](), calls(resident("llama", FP32, FP32))[call]())
    weight = in_a_hook(model, lambda module: module.weight)
    assert weight.isnan().all()  # nobody has written to what stands for no number


def test_so_is_who_writes_between_two_passes(model: Any, resident: Resident) -> None:
    in_a_hook(model, lambda module: module.weight.detach())
    twin = in_a_hook(model, lambda module: module.weight.detach())
    twin.mul_(2)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1.*can be used again"):
        model(IDS)
    assert torch.equal(model(IDS).logits, resident("llama", FP32, FP32)(IDS).logits)


def test_so_is_a_hook_that_keeps_an_average(model: Any, resident: Resident) -> None:
    """It writes while its own layer is in place, mostly elsewhere in the ring."""
    averages: dict[nn.Module, torch.Tensor] = {}

    def average(module: Any, *_: Any) -> None:
        weight = module.up_proj.weight.data
        if module in averages:
            averages[module].mul_(0.5).add_(weight, alpha=0.5)
        averages.setdefault(module, weight)

    handles = [layer.mlp.register_forward_hook(average) for layer in model.model.layers]
    expected = resident("llama", FP32, FP32)(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    for _ in range(3):
        with pytest.raises(UnsupportedError):
            model(IDS)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_so_is_a_change_of_a_layer_that_failed_itself(tiny: WriteTiny, budget: str | None) -> None:
    """The failure is what the first call reports. Its memory, with the change, might serve the next one."""
    with stream(tiny("llama", FP32), **({"max_memory": budget} if budget else {})) as model:
        model(IDS)

        def fail(module: Any, *_: Any) -> None:
            with torch.no_grad():
                module.weight.zero_()
            raise LookupError("a hook's own")

        handle = model.get_submodule(PATH).register_forward_pre_hook(fail)
        with pytest.raises(LookupError, match="own"):
            model(IDS)
        handle.remove()
        for _ in range(2):
            with pytest.raises(UnsupportedError, match=f"'{NAME}' has been replaced or changed"):
                model(IDS)


@pytest.mark.parametrize("budget", [None, "1GiB"])
@pytest.mark.parametrize("num_passes", [0, 1, 2])
def test_a_graph_that_a_hook_recorded_gives_the_right_gradient_or_none(
    tiny: WriteTiny, values: torch.Tensor, budget: str | None, num_passes: int
) -> None:
    inputs = torch.ones(2, values.shape[1], requires_grad=True)

    def record(module: Any) -> torch.Tensor:
        with torch.enable_grad():
            return nn.functional.linear(inputs, module.weight).sum()

    with stream(tiny("llama", FP32), **({"max_memory": budget} if budget else {})) as model:
        model(IDS)
        result = in_a_hook(model, record)
        for _ in range(num_passes):
            model(IDS)
        if budget is None:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.backward()
        else:
            result.backward()
            assert torch.allclose(inputs.grad, values.sum(0).expand_as(inputs), atol=1e-5)  # type: ignore[arg-type]


def test_in_the_hook_itself_it_does(model: Any, values: torch.Tensor) -> None:
    inputs = torch.ones(2, values.shape[1], requires_grad=True)

    def gradient(module: Any) -> None:
        with torch.enable_grad():
            nn.functional.linear(inputs, module.weight).sum().backward()

    in_a_hook(model, gradient)
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, values.sum(0).expand_as(inputs), atol=1e-5)


class Ones(Stored):
    """A weight of ones."""

    name = "ones"

    def read(self) -> torch.Tensor:
        return torch.ones(4)

    def rows(self, numbers: Any) -> torch.Tensor:
        return self.read()[numbers]

    def has(self, values: torch.Tensor) -> bool:
        return torch.equal(values, self.read())


def interrupted(call: Callable[[], None], after: int) -> bool:
    """Whether `call` was interrupted by Ctrl-C before its line number `after`, or had fewer."""
    lines, weight_file = 0, Loan.begin.__code__.co_filename

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != weight_file or frame.f_code.co_name not in ("begin", "end", "was_changed"):
            return None
        lines += event == "line"
        if lines == after:
            raise KeyboardInterrupt
        return trace

    was = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(was)
    return False


def test_an_interrupt_is_nobodys_change() -> None:
    """Wherever a loan begins or ends. That it ends is seen to once more."""
    memory = torch.ones(8, dtype=torch.float32)
    weights = [weight_of(memory[:4], Ones(), True, True), weight_of(memory[4:], Ones(), False, True)]
    loan = Loan(memory, weights)  # type: ignore[arg-type]
    twin = weights[1].detach()

    def lend() -> None:
        loan.begin()
        loan.end()

    lend()
    after = 1
    while interrupted(lend, after):
        loan.end()
        assert not loan.was_changed
        lend()
        assert not loan.was_changed
        assert all(weight.isnan().all() for weight in weights)
        after += 1
    assert after > 15
    twin.zero_()
    assert loan.was_changed
    lend()
    assert loan.was_changed
    loan.renew()
    assert not loan.was_changed
