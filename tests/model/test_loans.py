"""The memory of a streamed weight holds another one next: what somebody takes meanwhile has its values, or none."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from airstream.model.absent import Absent
from airstream.model.weight import Weight
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
