"""Several threads and processes with one model: turns between passes, calls from inside, forks, how a process ends."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LogitsProcessor

from airstream import BudgetError, ClosedError, UnsupportedError
from airstream.compat.kept_state import kept_state
from airstream.model import generations
from airstream.model.absent import Absent
from airstream.model.turns import Turns
from airstream.plan.request import Workload
from airstream.system.forks import FORKED_INSIDE
from tests.conftest import STREAMING, Readers, Resident, WriteTiny, least_memory, smallest_budget, stream
from tests.stand_ins.sim import SimDevice
from tests.stand_ins.streamers import After
from tests.stand_ins.threads import InThread, is_running
from tests.stand_ins.tiny_models import VOCAB_SIZE

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


class Noise(LogitsProcessor):
    """Sampling whose randomness is a generator of its own: the most likely token after Gumbel's noise."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.rand(scores.shape, generator=self.generator).clamp_min(1e-9)
        return scores - torch.log(-torch.log(uniform))


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
        thread.finish(120)
    assert not turns.is_taken


def test_a_turn_that_an_interrupt_has_kept_from_being_given_back_is_free() -> None:
    """As hooks take it: whoever took it has left the code in which it was needed."""
    turns = Turns()

    def work() -> None:
        turns.enter(lambda thread: is_running(work.__code__, thread))
        assert turns.is_taken

    other = InThread(work).finish(120)
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
        second[0].finish(120)  # inside the first: the old lock would have waited for ever

    first = InThread(
        lambda: model.generate(IDS, logits_processor=[Noise(1)], streamer=After(begin_second), **greedy(12))
    )
    assert torch.equal(first.finish(120).result, reference.generate(IDS, logits_processor=[Noise(1)], **greedy(12)))
    expected = reference.generate(OTHER_IDS, logits_processor=[Noise(2)], **greedy(6))
    assert torch.equal(second[0].finish(120).result, expected)
    assert first.ident != second[0].ident
    assert passes[2:8] == [second[0].ident] * 6


@pytest.mark.parametrize("prefetch_batches", [0, 1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_interleaved_generations_give_what_they_give_alone(
    tiny: WriteTiny, resident: Resident, name: str, prefetch_batches: int
) -> None:
    inputs = [IDS, OTHER_IDS, torch.cat([OTHER_IDS, OTHER_IDS.flip(1)])]
    options = [greedy(9), greedy(14), greedy(5) | {"num_beams": 2}]
    reference = resident(name, FP32, FP32)
    with stream(tiny(name, FP32), layers_per_batch=1, prefetch_batches=prefetch_batches) as model:
        order: list[int] = []
        model.register_forward_hook(lambda *_: order.append(threading.get_ident()))
        calls = [
            InThread(lambda ids=ids, kwargs=kwargs: model.generate(ids, **kwargs))
            for ids, kwargs in zip(inputs, options, strict=True)
        ]
        for call, ids, kwargs in zip(calls, inputs, options, strict=True):
            result = call.finish(120).result
            assert call.error is None
            assert torch.equal(result, reference.generate(ids, **kwargs))
        assert not model._engine._generations._all
    changes = sum(one != other for one, other in itertools.pairwise(order))
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
            return call(model) if by == "the same thread" else InThread(lambda: call(model)).finish(120).result

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


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def narrow(folder: Path) -> Iterator[Any]:
    """A model with room for one of `LARGE`, or for small ones beside it."""
    with stream(folder, max_context=64, max_batch_size=1, **SMALL_STEPS) as model:
        engine = model._engine
        large = Workload.generation(1, OTHER_IDS.shape[1] + LARGE["max_new_tokens"], OTHER_IDS.shape[1])
        beside = replace(large, beside_bytes=engine.plans.kv_bytes(large))
        assert (engine.plans.has_room(large), engine.plans.has_room(beside)) == (True, False)
        yield model


LARGE = greedy(120)


def test_a_generation_that_does_not_fit_beside_another_waits_for_it(narrow: Any, reference: Any) -> None:
    ended: list[str] = []
    calls: list[InThread] = []

    def large(name: str, streamer: Any = None) -> Any:
        tokens = narrow.generate(OTHER_IDS, streamer=streamer, **LARGE)
        ended.append(name)
        return tokens

    def begin_others() -> None:
        calls.append(InThread(lambda: large("second")))
        calls.append(InThread(lambda: narrow.generate(OTHER_IDS, **greedy(4))))
        calls[1].finish(120)
        assert not ended

    tokens = large("first", After(begin_others))
    assert torch.equal(tokens, reference.generate(OTHER_IDS, **LARGE))
    assert torch.equal(calls[0].finish(120).result, tokens)
    assert torch.equal(calls[1].result, reference.generate(OTHER_IDS, **greedy(4)))
    assert ended == ["first", "second"]


@pytest.mark.parametrize("by", ["the same thread", "another thread"])
def test_what_would_wait_for_itself_is_refused(
    narrow: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A call from inside a generation that has to end first: seen at once in one thread, else by its standing still."""
    monkeypatch.setattr(generations, "PATIENCE_SECONDS", 0.5)
    errors: list[BaseException | None] = []

    def ask() -> None:
        if by == "another thread":
            errors.append(InThread(lambda: narrow.generate(OTHER_IDS, **LARGE)).finish(120).error)
            return
        with pytest.raises(BudgetError) as error:
            narrow.generate(OTHER_IDS, **LARGE)
        errors.append(error.value)

    tokens = narrow.generate(OTHER_IDS, streamer=After(ask), **LARGE)
    assert torch.equal(tokens, reference.generate(OTHER_IDS, **LARGE))
    assert isinstance(errors[0], BudgetError)
    assert "KiB of generations under way" in str(errors[0])
    assert "max_memory" in str(errors[0])


def test_the_kv_caches_of_all_generations_are_in_the_plan(folder: Path, reference: Any) -> None:
    """Weights that stay make room for both, and come back when both have ended."""
    options = {"max_context": 64, "max_batch_size": 1, **SMALL_STEPS}
    budget = least_memory(folder, **(STREAMING | options))["cpu"] + 400_000
    with stream(folder, max_memory=budget, **options) as model:
        normal, planned = model.plan, []
        model.register_forward_hook(lambda *_: planned.append(model.plan))

        def begin_second() -> None:
            InThread(lambda: model.generate(IDS, **greedy(150))).finish(120)

        tokens = model.generate(IDS, streamer=After(begin_second), **greedy(200))
        assert torch.equal(tokens, reference.generate(IDS, **greedy(200)))
        held = model._engine.plans.kv_bytes(Workload.generation(1, IDS.shape[1] + 200, IDS.shape[1]))
        largest = max(planned, key=lambda plan: plan.tiers["cpu"].items["KV cache"])
        assert largest.tiers["cpu"].items["KV cache"] > 1.5 * held
        assert largest.resident_bytes < normal.resident_bytes
        assert largest.peak_bytes["cpu"] <= budget
        model(IDS)
        assert model.plan == normal


# --------------------------------------------------------------------------------------------------------------- state

KEPT = {
    "LlamaForCausalLM": None,
    "Qwen3MoeForCausalLM": None,
    "GptOssForCausalLM": None,
    "Mamba2ForCausalLM": None,
    "T5ForConditionalGeneration": None,
    "Qwen2VLForConditionalGeneration": "self.model.rope_deltas",
    "RecurrentGemmaForCausalLM": "self.conv1d_state",
}


@pytest.mark.parametrize("name", KEPT)
def test_it_is_known_which_models_keep_something_of_a_generation(name: str) -> None:
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    assert kept_state(model.modules()) == KEPT[name]


def test_frequencies_that_follow_the_longest_sequence_are_kept() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=10, rope_parameters=scaling)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert "RoPE" in str(kept_state(model.modules()))


class WithoutSource(torch.nn.Module):
    """Stands for a class whose code cannot be read: it has moved."""


def test_a_model_whose_code_cannot_be_read_may_keep_anything() -> None:
    moved: Any = type("Moved", (WithoutSource,), {"__module__": "somewhere.else", "__qualname__": "Moved"})
    assert "somewhere.else" in str(kept_state([moved()]))


def test_generations_of_a_model_that_keeps_something_of_them_come_one_after_the_other(
    model: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "kept_state", lambda _: "self.of_this_generation")
    order: list[int] = []
    model.register_forward_hook(lambda *_: order.append(threading.get_ident()))
    calls = [InThread(lambda: model.generate(IDS, **greedy(6))) for _ in range(3)]
    calls.append(InThread(lambda: model(IDS)))
    for call in calls[:3]:
        assert torch.equal(call.finish(120).result, reference.generate(IDS, **greedy(6)))
    assert torch.equal(calls[3].finish(120).result.logits, reference(IDS).logits)
    assert len([key for key, _ in itertools.groupby(order)]) == 4

    monkeypatch.setattr(generations, "PATIENCE_SECONDS", 0.5)
    after = After(lambda: InThread(lambda: model(OTHER_IDS)).finish(120).error)
    model.generate(IDS, streamer=after, **greedy(6))
    assert isinstance(after.result, UnsupportedError)
    assert "self.of_this_generation" in str(after.result)
    after = After(lambda: model(OTHER_IDS).logits)  # as in transformers: whoever calls knows
    model.generate(IDS, streamer=after, **greedy(6))
    assert torch.equal(after.result, reference(OTHER_IDS).logits)


def test_adapters_change_between_the_generations_of_other_threads(model: Any) -> None:
    """What loads and deletes them waits, but for a generation of its own thread."""
    order: list[str] = []
    others: list[InThread] = []

    def change(name: str) -> None:
        with model._engine.between_generations():
            order.append(name)

    def ask() -> None:
        change("inside")
        others.append(InThread(lambda: change("another thread")))
        others[0].join(0.5)
        order.append("going on")

    model.generate(IDS, streamer=After(ask), **greedy(6))
    others[0].finish(120)
    assert order == ["inside", "going on", "another thread"]


# ------------------------------------------------------------------------------------------------------------- profile


def test_the_profile_of_interleaved_generations_counts_each(model: Any) -> None:
    def begin_second() -> None:
        InThread(lambda: model.generate(OTHER_IDS, **greedy(4))).finish(120)

    with model.profile() as profile:
        model.generate(IDS, streamer=After(begin_second), **greedy(7))
    assert profile.new_tokens == 7 + 4
    assert len(profile.ttft_seconds) == 2
    assert [one.phase for one in profile.passes].count("prefill") == 2
    assert len(profile.passes) == 7 + 4
    for one, following in itertools.pairwise(profile.passes):  # every second counts once
        assert one.start + one.costs.wall_seconds <= following.start + 1e-6


# ------------------------------------------------------------------------------------------------------------- closing


@pytest.mark.parametrize(
    "place", ["embed_tokens", "layers.0", "layers.1.self_attn.q_proj", "layers.2.mlp", "layers.3", "norm", "lm_head"]
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("call", ["forward", "generate", "layer"])
def test_closing_inside_a_hook(folder: Path, readers: Readers, call: str, before: bool, place: str) -> None:
    """What has its weights goes on to its end; whatever would need more says that the model is closed."""
    model = stream(folder, **SMALL_STEPS)
    module = model.get_submodule(place if place == "lm_head" else f"model.{place}")
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    register(lambda *_: model.close())
    if call == "generate":
        with pytest.raises(ClosedError, match="from_pretrained"):
            model.generate(IDS, **greedy(20))
    elif call == "forward":
        with contextlib.suppress(ClosedError):  # by the last module, there is nothing left to need
            model(IDS)
    elif "mlp" in place or place == "lm_head":
        with contextlib.suppress(ClosedError):
            module(torch.ones(1, 2, model.config.hidden_size))
        model.close()
    model.close()
    assert readers() == []
    for unit in (name for batch in model.plan.batches for name in batch.units):
        assert all(isinstance(parameter, Absent) for parameter in model.get_submodule(unit).parameters()), unit
    for use in CALLS.values():
        with pytest.raises(ClosedError, match="from_pretrained"):
            use(model)


def test_closing_wakes_those_who_wait_for_their_turn_and_for_memory(narrow: Any, readers: Readers) -> None:
    calls: list[InThread] = []

    def begin_others_and_close() -> None:
        calls.append(InThread(lambda: narrow.generate(OTHER_IDS, **LARGE)))
        calls.append(InThread(lambda: narrow(OTHER_IDS.expand(4, -1))))
        narrow.close()

    with pytest.raises(ClosedError):
        narrow.generate(OTHER_IDS, streamer=After(begin_others_and_close), **LARGE)
    assert isinstance(calls[0].finish(120).error, ClosedError)
    assert calls[1].finish(120).error is None or isinstance(calls[1].error, ClosedError)
    assert readers() == []


ENDING = """
import sys, threading, time
import torch
from transformers.utils import logging
from airstream import AutoModel

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
options = dict(device="cpu", layers_per_batch=1, max_context=256)
model = AutoModel.from_pretrained(sys.argv[1], max_memory=sys.argv[2], **options)
ids = torch.arange(5, 17)[None]
running = [threading.Event() for _ in range(3)]

def again(number, call):
    while True:
        call()
        running[number].set()

hidden = torch.ones(1, 2, model.config.hidden_size)
calls = [
    lambda: model.generate(ids, do_sample=False, min_new_tokens=100 if running[0].is_set() else 2, max_new_tokens=100),
    lambda: model(ids),
    lambda: model.model.layers[1].mlp(hidden),
]
for number, call in enumerate(calls):
    threading.Thread(target=again, args=(number, call), daemon=True).start()
for event in running:
    event.wait()
sys.exit(5)
"""


def test_a_process_ends_quietly_while_daemon_threads_compute(folder: Path) -> None:
    budget = smallest_budget(folder, layers_per_batch=1, max_context=256)["cpu"]
    result = subprocess.run(
        [sys.executable, "-c", ENDING, str(folder), budget], capture_output=True, text=True, timeout=240
    )
    assert (result.returncode, result.stderr, result.stdout) == (5, "", "")


# --------------------------------------------------------------------------------------------------------------- forks

FORKS = """
import atexit, json, multiprocessing, os, sys, threading, time
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset
from airstream import AirstreamError, AutoModel

FORK, SPAWN = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")
IDS = torch.arange(5, 17)[None]
SECONDS = 200


def load():
    options = dict(layers_per_batch=1, prefetch_batches=1, max_context=256)
    return AutoModel.from_pretrained(sys.argv[1], device="cpu", max_memory=sys.argv[2], **options)


def tokens(model):
    return model.generate(IDS, do_sample=False, min_new_tokens=6, max_new_tokens=6).tolist()


def in_two_threads(model):
    results = []
    threads = [threading.Thread(target=lambda: results.append(tokens(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def closed(model):
    model.close()
    return tokens(model)


def loaded_here():
    with load() as model:
        return tokens(model)


def report(sender, function):
    try:
        result = function()
    except AirstreamError as error:
        result = f"{type(error).__name__}: {error}"
    sender.send(result)
    sender.close()


def start(function, context=FORK):
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(sender, function))
    process.start()
    sender.close()
    return process, receiver


def finish(process, receiver):
    result = receiver.recv() if receiver.poll(SECONDS) else "hangs"
    process.join(60)
    if process.is_alive():
        process.kill()
        result = "does not end"
    return result


def child(function, context=FORK):
    return finish(*start(function, context))


def exit_code(pid):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, 9)
    return "hangs"


class Data(Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return tokens(self.model)[0] if index else [0] * 18


if __name__ == "__main__":
    torch.set_num_threads(2)
    model = load()
    seen = {"before the parent computes": child(partial(tokens, model))}
    seen["expected"] = tokens(model)
    children = [start(partial(tokens, model)) for _ in range(3)]
    seen["parent beside its children"] = tokens(model)
    seen["several children"] = [finish(*each) for each in children]
    seen["two threads"] = child(partial(in_two_threads, model))
    hidden = torch.ones(1, 2, model.config.hidden_size)
    seen["layer"] = child(lambda: model.model.layers[1].mlp(hidden).tolist())
    seen["expected of the layer"] = model.model.layers[1].mlp(hidden).tolist()
    seen["rows"] = child(lambda: list(model.get_input_embeddings()(IDS).shape))
    seen["closed"] = child(partial(closed, model))
    seen["grandchild"] = child(lambda: (tokens(model), child(partial(tokens, model)))[1])
    loader = DataLoader(Data(model), batch_size=None, num_workers=2, timeout=SECONDS, multiprocessing_context="fork")
    seen["data"] = [list(map(int, batch)) for batch in loader]

    pid = os.fork()
    if not pid:
        atexit._run_exitfuncs()  # and no more: torch joins threads of its own which are not here
        os._exit(4)
    seen["unused"] = exit_code(pid)

    def fork_and_go_on(*_):
        handle.remove()
        seen["inside a pass"] = child(partial(tokens, model))
        seen["pid"] = os.fork()

    handle = model.model.layers[1].mlp.register_forward_hook(fork_and_go_on)
    try:
        model(IDS)
    except AirstreamError as error:
        os._exit(3 if type(error).__name__ == "UnsupportedError" else 1)
    if not seen["pid"]:
        os._exit(2)
    seen["going on with a pass"] = exit_code(seen.pop("pid"))
    seen["parent behind its children"] = tokens(model)
    model.close()
    seen["loaded in a child of a parent that has computed"] = child(loaded_here)
    seen["spawn"] = child(loaded_here, SPAWN)
    print(json.dumps(seen))
"""


@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_computes_what_its_parent_does(folder: Path, tmp_path: Path) -> None:
    """Or says why not. What hangs is killed, there and here."""
    script = tmp_path / "forks.py"
    script.write_text(FORKS)
    budget = least_memory(folder, layers_per_batch=1, prefetch_batches=1, max_context=256)["cpu"]
    command = [sys.executable, str(script), str(folder), str(budget)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    expected = seen.pop("expected")
    assert seen.pop("layer") == seen.pop("expected of the layer")
    assert seen == {
        "before the parent computes": expected,
        "parent beside its children": expected,
        "several children": [expected] * 3,
        "two threads": [expected] * 2,
        "rows": [1, 12, 64],
        "closed": "ClosedError: the model is closed: load it again with from_pretrained()",
        "grandchild": expected,
        "data": [[0] * 18, *expected],
        "unused": 4,
        "inside a pass": f"UnsupportedError: {FORKED_INSIDE}",
        "going on with a pass": 3,
        "parent behind its children": expected,
        "loaded in a child of a parent that has computed": expected,
        "spawn": expected,
    }


def test_an_accelerator_is_refused_in_a_fork(folder: Path, sim: SimDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    with stream(folder, "sim:0", **SMALL_STEPS) as model:
        ids = IDS.to(model.device)
        expected, pid = model(ids).logits, os.getpid()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: pid + 1)
            for _ in range(2):
                with pytest.raises(UnsupportedError, match=r"sim:0 does not work in a forked process.*spawn"):
                    model(ids)
        assert torch.equal(model(ids).logits, expected)
