"""Several threads and processes with one model: turns between passes, calls from inside, forks, the end of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from airstream import BudgetError, ClosedError, UnsupportedError
from airstream.compat import kept_state
from airstream.model import generations
from airstream.model.absent import Absent
from airstream.plan import Workload
from airstream.turns import Turns, is_running
from tests.conftest import Readers, Resident, WriteTiny, smallest_budget, stream
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.timeout(300)  # what hangs here hangs for good

FP32 = torch.float32
IDS = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(1))
OTHER_IDS = torch.randint(3, VOCAB_SIZE, (1, 5), generator=torch.Generator().manual_seed(2))
SMALL_STEPS: dict[str, Any] = {"layers_per_batch": 1, "prefetch_batches": 1}


def greedy(count: int) -> dict[str, Any]:
    return {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", FP32)


@pytest.fixture
def reference(resident: Resident) -> Any:
    return resident("llama", FP32, FP32)


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with stream(folder, **SMALL_STEPS) as model:
        yield model


class InThread(threading.Thread):
    """Runs a function and keeps what it returns or raises."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error

    def finish(self) -> InThread:
        self.join(timeout=120)
        assert not self.is_alive(), "the thread hangs"
        return self


class Noise(LogitsProcessor):
    """Sampling whose randomness is a generator of its own: the most likely token after Gumbel's noise."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.rand(scores.shape, generator=self.generator).clamp_min(1e-9)
        return scores - torch.log(-torch.log(uniform))


class After(BaseStreamer):
    """Calls a function, once, when a token has come after the prompt, in the middle of `generate`."""

    def __init__(self, react: Callable[[], Any]) -> None:
        self.react = react
        self.count = 0
        self.result: Any = None

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        if self.count == 3:
            self.result = self.react()

    def end(self) -> None:
        pass


# --------------------------------------------------------------------------------------------------------------- turns


def test_the_turn_goes_to_whoever_has_waited_longest() -> None:
    turns, order, threads = Turns(), [], []

    def take(number: int) -> None:
        with turns.hold():
            order.append(number)

    with turns.hold():
        for number in range(5):
            threads.append(InThread(lambda number=number: take(number)))
            while len(turns._tickets) <= number:
                pass
        with turns.hold():
            assert order == []
    with turns.hold():  # asked for last, though by the thread that had it
        assert order == [0, 1, 2, 3, 4]
    for thread in threads:
        thread.finish()
    assert not turns.is_taken


def test_a_turn_that_an_interrupt_has_kept_from_being_given_back_is_free() -> None:
    """As hooks take it: whoever took it has left the code in which it was needed."""
    turns = Turns()

    def work() -> None:
        turns.enter(lambda thread: is_running(work.__code__, thread))
        assert turns.is_taken

    other = InThread(work).finish()
    assert other.error is None
    with turns.hold():
        assert turns.is_mine
    assert not turns.is_taken


def test_two_generations_take_turns_between_passes(model: Any, reference: Any) -> None:
    """A short one is over long before a long one that began earlier. Each gives what it gives alone, to the bit."""
    passes: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(threading.get_ident()))
    second: list[InThread] = []

    def begin_second() -> None:
        second.append(InThread(lambda: model.generate(OTHER_IDS, logits_processor=[Noise(2)], **greedy(6))))
        second[0].finish()  # inside the first: the old lock would have waited for ever

    first = InThread(
        lambda: model.generate(IDS, logits_processor=[Noise(1)], streamer=After(begin_second), **greedy(12))
    )
    assert torch.equal(first.finish().result, reference.generate(IDS, logits_processor=[Noise(1)], **greedy(12)))
    expected = reference.generate(OTHER_IDS, logits_processor=[Noise(2)], **greedy(6))
    assert torch.equal(second[0].finish().result, expected)
    assert first.ident != second[0].ident
    assert passes[2:8] == [second[0].ident] * 6


@pytest.mark.parametrize("prefetch_batches", [0, 1, 3])
@pytest.mark.parametrize("name", ["llama", "t5", "qwen3_moe"])
def test_interleaved_generations_give_what_they_give_alone(
    tiny: WriteTiny, resident: Resident, name: str, prefetch_batches: int
) -> None:
    inputs = [IDS, OTHER_IDS, torch.cat([OTHER_IDS, OTHER_IDS.flip(1)])]
    options = [greedy(9), greedy(14), greedy(5) | {"num_beams": 2}]
    reference = resident(name, FP32, FP32)
    with stream(tiny(name, FP32), layers_per_batch=1, prefetch_batches=prefetch_batches) as model:
        order: list[int] = []
        model._engine.observer.watchers.append(lambda: order.append(threading.get_ident()))
        calls = [
            InThread(lambda ids=ids, kwargs=kwargs: model.generate(ids, **kwargs))
            for ids, kwargs in zip(inputs, options, strict=True)
        ]
        for call, ids, kwargs in zip(calls, inputs, options, strict=True):
            result = call.finish().result
            assert call.error is None
            assert torch.equal(result, reference.generate(ids, **kwargs))
        assert not model._engine._generations._all
    changes = sum(one != other for one, other in zip(order, order[1:], strict=False))
    assert changes > len(calls), "they did not take turns"


CALLS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda model: model(OTHER_IDS).logits,
    "generate": lambda model: model.generate(OTHER_IDS, **greedy(4)),
    "base model": lambda model: model.base_model(OTHER_IDS).last_hidden_state,
    "layer": lambda model: model.base_model.layers[1].mlp(torch.ones(1, 2, model.config.hidden_size)),
    "head": lambda model: model.lm_head(torch.ones(1, 2, model.config.hidden_size)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("by", ["the same thread", "another thread"])
@pytest.mark.parametrize("at", ["streamer", "processor", "criterion"])
def test_a_call_from_inside_generate_is_answered(
    model: Any, reference: Any, at: str, by: str, call: Callable[[Any], Any]
) -> None:
    def ask() -> Any:
        with torch.no_grad():
            return call(model) if by == "the same thread" else InThread(lambda: call(model)).finish().result

    after = After(ask)

    def on_step(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        after.put(ids)
        return scores if at == "processor" else torch.zeros(len(ids), dtype=torch.bool)

    key = {"streamer": "streamer", "processor": "logits_processor", "criterion": "stopping_criteria"}[at]
    kwargs = {key: after if at == "streamer" else [on_step]}
    tokens = model.generate(IDS, **kwargs, **greedy(6))
    assert torch.equal(tokens, reference.generate(IDS, **greedy(6)))
    with torch.no_grad():
        assert torch.equal(after.result, call(reference))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_from_inside_a_layer_is_refused_and_does_no_harm(
    model: Any, reference: Any, call: Callable[[Any], Any]
) -> None:
    errors: list[BaseException] = []

    def ask(*_: object) -> None:
        with pytest.raises(UnsupportedError, match=r"while model.layers.2 computes") as error:
            call(model)
        errors.append(error.value)

    model.model.layers[2].mlp.register_forward_hook(ask)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)
    assert len(errors) == 1


def test_a_generation_that_does_not_fit_beside_another_waits_for_it(folder: Path, reference: Any) -> None:
    budget = smallest_budget(folder, max_context=64)
    with stream(folder, max_memory=budget, max_context=64, max_batch_size=1) as model:
        ended: list[str] = []
        calls: list[InThread] = []

        def large(name: str, streamer: Any = None) -> Any:
            tokens = model.generate(OTHER_IDS.expand(2, -1), streamer=streamer, **greedy(100))
            ended.append(name)
            return tokens

        def begin_another() -> None:
            calls.append(InThread(lambda: large("second")))
            assert wait_until(lambda: bool(waiting(model)))

        fits_alone(model, monkey=None)
        large("first", WithBatch(begin_another))
        assert torch.equal(calls[0].finish().result, reference.generate(OTHER_IDS.expand(2, -1), **greedy(100)))
        assert ended == ["first", "second"]
