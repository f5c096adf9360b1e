"""Ctrl-C, which comes between any two steps of the main thread: the model works on, in every thread, and is closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tests.conftest import WriteTiny, stream
from tests.stand_ins.interrupts import Interrupts
from tests.stand_ins.process import descriptors
from tests.stand_ins.threads import InThread
from tests.stand_ins.tiny_models import VOCAB_SIZE

IDS = torch.randint(3, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(1))
HIDDEN = torch.ones(1, 3, 64)

CALLS: Mapping[str, Callable[[Any], Any]] = {
    "a pass": lambda model: model(IDS),
    "a generation": lambda model: model.generate(IDS, max_new_tokens=2, do_sample=False),
    "a part": lambda model: model.model.layers[1].mlp(HIDDEN),
    "a part whose weights stay": lambda model: model.model.norm(HIDDEN),
    "the link": lambda model: model.measure_link(),
    "a copy": lambda model: model.state_dict()["model.layers.1.mlp.up_proj.weight"].clone(),
}
MOST = {"a generation": 30, "a part": 200}
"""Places, of hundreds, in which each is interrupted, so that the test takes seconds; elsewhere, 60."""


@pytest.mark.parametrize("name", CALLS)
def test_a_model_works_on_after_an_interrupt(tiny: WriteTiny, name: str) -> None:
    threads, folder = set(threading.enumerate()), tiny("llama-tied", torch.float32)
    with torch.no_grad(), stream(folder) as model:
        expected, part = model(IDS).logits, model.model.layers[1].mlp(HIDDEN)
        interrupts = Interrupts(lambda: CALLS[name](model), MOST.get(name, 60))
        num_interrupted = 0
        for place, count in interrupts.places:
            num_interrupted += interrupts.at(place, count)
            torch.set_grad_enabled(False)  # torch's own `with` may have been interrupted
            assert torch.equal(model.model.layers[1].mlp(HIDDEN), part), place
            assert torch.equal(model(IDS).logits, expected), place
            assert torch.equal(InThread(lambda: model(IDS).logits).finish().result, expected), place
            assert not model._engine.gate.turns.is_taken, place
        assert num_interrupted > len(interrupts.places) / 2, "the case is not what it is meant to be"
    assert set(threading.enumerate()) <= threads
    assert not descriptors(folder)


def test_a_model_whose_closing_was_interrupted_is_closed_by_the_next_call(tiny: WriteTiny) -> None:
    threads, folder = set(threading.enumerate()), tiny("llama-tied", torch.float32)
    models: list[Any] = []

    def load() -> Any:
        models[:] = [stream(folder)]
        models[0](IDS)
        return models[0]

    load()
    interrupts = Interrupts(lambda: models[0].close(), 20)
    for place, count in interrupts.places:
        load()
        interrupts.at(place, count)
        models[0].close()
        assert set(threading.enumerate()) <= threads, place
        assert not descriptors(folder), place
