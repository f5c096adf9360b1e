"""A streamed model from its first byte to its last: what it refuses, how it fails, what it leaves behind."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, TextIteratorStreamer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.generation.streamers import BaseStreamer

import airstream
from airstream import AutoModel, BudgetError, CheckpointError, ClosedError, ReadError, UnsupportedError, auto
from airstream.model import streamed
from airstream.model.absent import Absent
from airstream.streaming import streamer
from airstream.streaming.room import RoomChanged
from airstream.streaming.streamer import Streamer
from airstream.transfer.files import WeightFile
from airstream.transfer.jobs import Outcome
from tests.conftest import Readers, Resident, WriteTiny, cache_in, cache_of, on_accelerator, smallest_budget, stream
from tests.stand_ins.sim import SimDevice
from tests.stand_ins.threads import InThread, is_running
from tests.stand_ins.tiny_models import LLAMA, VOCAB_SIZE, TinyModel, write_model

pytestmark = pytest.mark.timeout(120)  # what hangs here hangs for good

FP32 = torch.float32
IDS = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
ENDLESS: dict[str, Any] = {"do_sample": False, "min_new_tokens": 200, "max_new_tokens": 200}
SMALL_STEPS: dict[str, Any] = {"layers_per_batch": 1, "prefetch_batches": 1}


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


class Mishap(Exception):  # noqa: N818 - not only errors happen
    """What goes wrong in these tests."""


class DelicateTranspose(Transpose):
    """A conversion that can be made to fail."""

    fails = False

    def convert(self, *args: Any, **kwargs: Any) -> Any:
        if type(self).fails:
            raise Mishap
        return super().convert(*args, **kwargs)


@pytest.fixture(scope="module")
def converting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers have to be converted after they have been read."""
    converter = WeightConverter("down_transposed.weight", "down_proj.weight", [DelicateTranspose(0, 1)])
    register_checkpoint_conversion_mapping("olmo2", [converter], overwrite=True)
    folder = tmp_path_factory.mktemp("converting")
    write_model(TinyModel("olmo2", LLAMA), folder, FP32)
    return folder


@pytest.fixture
def slow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read takes 50 ms more."""
    read_into = WeightFile.read_into

    def slowly(*args: Any) -> None:
        time.sleep(0.05)
        read_into(*args)

    monkeypatch.setattr(WeightFile, "read_into", slowly)


def assert_works(model: Any, reference: Any) -> None:
    assert torch.equal(model(IDS).logits, reference(IDS).logits)
    assert torch.equal(model.generate(IDS, **GREEDY), reference.generate(IDS, **GREEDY))


def assert_nothing_bound(model: Any) -> None:
    """Not one weight of a streamed layer is in place."""
    for batch in model.plan.batches:
        for unit in batch.units:
            assert all(isinstance(parameter, Absent) for parameter in model.get_submodule(unit).parameters()), unit


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


# ---------------------------------------------------------------------------------------- what it is and what it is not


def test_it_is_what_the_checkpoint_says(model: Any, reference: Any) -> None:
    cls = type(model)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, PreTrainedModel)
    assert (cls.__name__, cls.__module__) == (LlamaForCausalLM.__name__, LlamaForCausalLM.__module__)
    assert type(model.base_model).__name__ == type(reference.base_model).__name__
    assert model.device == torch.device("cpu")
    assert model.dtype == FP32
    assert not model.training
    assert [each.requires_grad for each in model.parameters()] == [
        each.requires_grad for each in reference.parameters()
    ]
    assert model.num_parameters() == reference.num_parameters()


def test_it_is_not_made_by_its_constructor() -> None:
    with pytest.raises(UnsupportedError, match="from_pretrained"):
        AutoModel()


CHANGES_NOTHING: dict[str, Callable[[Any], Any]] = {
    "to device": lambda model: model.to("cpu"),
    "to dtype": lambda model: model.to(FP32),
    "to both": lambda model: model.to(device=torch.device("cpu"), dtype=FP32),
    "to what a tensor has": lambda model: model.to(torch.zeros(1)),
    "cpu": lambda model: model.cpu(),
    "float": lambda model: model.float(),
    "eval": lambda model: model.eval(),
    "train(False)": lambda model: model.train(False),
    "requires_grad_(False)": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("call", CHANGES_NOTHING.values(), ids=CHANGES_NOTHING)
def test_calls_that_change_nothing_are_allowed(model: Any, reference: Any, call: Callable[[Any], Any]) -> None:
    assert call(model) is model
    assert_works(model, reference)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "to dtype": (lambda model: model.to(torch.float16), r"from_pretrained\(.*dtype="),
    "to device": (lambda model: model.to("meta"), r"from_pretrained\(.*device="),
    "to what a tensor has": (lambda model: model.to(torch.zeros(1, dtype=torch.float64)), "dtype="),
    "cuda": (lambda model: model.cuda(), "device="),
    "half": (lambda model: model.half(), "dtype="),
    "bfloat16": (lambda model: model.bfloat16(), "dtype="),
    "double": (lambda model: model.double(), "dtype="),
    "type": (lambda model: model.type(torch.float64), "dtype="),
    "base model's half": (lambda model: model.base_model.half(), "dtype="),
    "train": (lambda model: model.train(), "fine-tune the checkpoint"),
    "base model's train": (lambda model: model.base_model.train(), "fine-tune the checkpoint"),
    "requires_grad_": (lambda model: model.requires_grad_(), "fine-tune the checkpoint"),
    "save_pretrained": (lambda model: model.save_pretrained("never-written"), "copy that folder"),
    "push_to_hub": (lambda model: model.push_to_hub("nobody/nothing"), "upload that folder"),
    "resize_token_embeddings": (lambda model: model.resize_token_embeddings(200), "resize and save the checkpoint"),
}


@pytest.mark.parametrize(("call", "remedy"), REFUSED.values(), ids=REFUSED)
def test_calls_that_cannot_work_name_the_remedy(
    tiny: WriteTiny, resident: Resident, call: Callable[[Any], Any], remedy: str
) -> None:
    """And do nothing. The model has tied weights in memory, which such a call could change."""
    with stream(tiny("llama-tied", FP32), **SMALL_STEPS) as model:
        with pytest.raises(UnsupportedError, match=remedy):
            call(model)
        assert not Path("never-written").exists()
        assert_works(model, resident("llama-tied", FP32, FP32))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # torch asks for every attribute
@pytest.mark.parametrize("part", ["", "model"])
def test_recording_a_program_is_refused(tiny: WriteTiny, part: str) -> None:
    """It would have the weights of one pass in it."""
    with stream(tiny("llama", FP32)) as model, pytest.raises(UnsupportedError, match=r"torch\.jit\.trace\(\): trace"):
        torch.jit.trace(model.get_submodule(part), torch.ones(1, 3).long())


# ------------------------------------------------------------------------------------------------------------ closing


def test_close_ends_threads_and_files_and_may_be_called_again(folder: Path, readers: Readers) -> None:
    model = stream(folder)
    assert len(readers()) > 0
    assert open_files(folder)
    for _ in range(3):
        model.close()
        assert readers() == []
        assert open_files(folder) == []


def open_files(folder: Path) -> list[str]:
    return [file.path for file in psutil.Process().open_files() if Path(file.path).parent == folder]


USES: dict[str, Callable[[Any], Any]] = {
    "call": lambda model: model(IDS),
    "generate": lambda model: model.generate(IDS, **GREEDY),
    "base model": lambda model: model.base_model(IDS),
}


def enter(model: Any) -> None:
    with model:
        raise Mishap


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_use_after_close(folder: Path, use: Callable[[Any], Any]) -> None:
    with stream(folder) as model:
        use(model)
    with pytest.raises(ClosedError, match="from_pretrained"):
        use(model)
    with pytest.raises(ClosedError, match="from_pretrained"):
        enter(model)
    assert model.plan.peak_bytes["cpu"] > 0
    assert model.stats.streamed_bytes > 0


def test_the_context_manager_closes_on_an_error_and_lets_it_pass(folder: Path, readers: Readers) -> None:
    with pytest.raises(Mishap), stream(folder):
        raise Mishap
    assert readers() == []


@pytest.mark.parametrize("checkpoint", ["llama-tied", "converting"])
def test_a_forgotten_model_closes(tiny: WriteTiny, converting: Path, readers: Readers, checkpoint: str) -> None:
    folder = converting if checkpoint == "converting" else tiny(checkpoint, FP32)
    model = stream(folder)
    model(IDS)
    del model
    gc.collect()
    assert wait_until(lambda: readers() == [], seconds=3)
    assert open_files(folder) == []


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_part_of_a_forgotten_model_says_that_nobody_held_it(folder: Path, is_closed: bool) -> None:
    model = stream(folder)
    layer = model.model.layers[1]
    if is_closed:
        model.close()
    del model
    gc.collect()
    said = "^the model is closed" if is_closed else "^the model that this is a part of is closed, for nobody held it"
    with pytest.raises(ClosedError, match=said):
        layer(torch.zeros(1, 3, 64))


def test_a_forgotten_model_closes_whoever_collects_it(
    tiny: WriteTiny, readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector runs in any thread, so in a reader's too, which cannot wait for itself to end."""
    is_prefetching, is_forgotten = threading.Event(), threading.Event()
    read_into, start = WeightFile.read_into, Streamer.start

    def collect_and_read(*args: Any) -> None:
        if is_prefetching.is_set():
            is_forgotten.wait(5)
            gc.collect()
        read_into(*args)

    def start_and_tell(streamer: Streamer) -> None:
        is_prefetching.set()
        start(streamer)

    monkeypatch.setattr(WeightFile, "read_into", collect_and_read)
    monkeypatch.setattr(Streamer, "start", start_and_tell)
    cycle: list[Any] = [stream(tiny("qwen2", FP32), **SMALL_STEPS)]
    cycle.append(cycle)
    is_alive = weakref.ref(cycle[0])
    gc.disable()  # it then runs only where it is told to
    try:
        del cycle
        assert is_alive()
        is_forgotten.set()
        assert wait_until(lambda: is_alive() is None, seconds=3)
        assert wait_until(lambda: readers() == [], seconds=3)
    finally:
        gc.enable()


def test_closing_during_prefetch(folder: Path, slow_reads: None, readers: Readers) -> None:
    """The first layers are being read, and nobody waits for them."""
    model = stream(folder, layers_per_batch=1, prefetch_batches=3)
    started = time.monotonic()
    model.close()
    assert time.monotonic() - started < 5
    assert readers() == []


class Signals(BaseStreamer):
    """Calls a function with the number of times it was given tokens."""

    def __init__(self, react: Callable[[int], None]) -> None:
        self.react = react
        self.count = 0

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        self.react(self.count)

    def end(self) -> None:
        pass


@pytest.mark.parametrize("prefetch_batches", [0, 1, 3])
def test_closing_from_another_thread_stops_generate(folder: Path, prefetch_batches: int, readers: Readers) -> None:
    model = stream(folder, layers_per_batch=1, prefetch_batches=prefetch_batches)
    is_running = threading.Event()
    streamer = Signals(lambda count: is_running.set() if count == 3 else None)
    call = InThread(lambda: model.generate(IDS, streamer=streamer, **ENDLESS))
    assert is_running.wait(30)
    model.close()
    assert isinstance(call.finish().error, ClosedError)
    assert readers() == []


def test_closing_wakes_a_call_that_waits_for_weights(folder: Path, slow_reads: None, readers: Readers) -> None:
    model = stream(folder, layers_per_batch=1, prefetch_batches=0)
    call = InThread(lambda: model(IDS))
    time.sleep(0.1)
    model.close()
    assert isinstance(call.finish().error, ClosedError)
    assert readers() == []


def test_closing_from_within_generate(folder: Path, readers: Readers) -> None:
    model = stream(folder, **SMALL_STEPS)
    with pytest.raises(ClosedError):
        model.generate(IDS, streamer=Signals(lambda count: model.close() if count == 3 else None), **ENDLESS)
    assert readers() == []


def test_an_abandoned_text_stream_can_be_closed(folder: Path) -> None:
    model = stream(folder, **SMALL_STEPS)
    text = TextIteratorStreamer(model.tokenizer)
    call = InThread(lambda: model.generate(IDS, streamer=text, **ENDLESS))
    assert [next(text) for _ in range(3)]
    model.close()
    assert isinstance(call.finish().error, ClosedError)


def test_nothing_is_written_beside_the_checkpoint(tmp_path: Path) -> None:
    write_model(TinyModel("llama", LLAMA), tmp_path, FP32)

    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path, *tmp_path.iterdir())}

    before = state()
    with stream(tmp_path) as model:
        model.generate(IDS, **GREEDY)
    assert state() == before


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("error", [Mishap, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp", "model.norm", "lm_head"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("layers_per_batch", [1, 3])
def test_an_exception_inside_leaves_nothing_bound(
    folder: Path,
    reference: Any,
    layers_per_batch: int,
    use: Callable[[Any], Any],
    place: str,
    error: type[BaseException],
) -> None:
    if place == "lm_head" and use is USES["base model"]:
        pytest.skip("the base model has no lm_head")

    def fail(*_: object) -> None:
        raise error

    with stream(folder, layers_per_batch=layers_per_batch) as model:
        handle = model.get_submodule(place).register_forward_hook(fail)
        for _ in range(2):
            with pytest.raises(error):
                use(model)
            assert_nothing_bound(model)
        handle.remove()
        assert_works(model, reference)
        assert_nothing_bound(model)


def test_an_interrupt_while_waiting_for_weights(folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the main thread wherever it is: here it waits for the disk.

    One signal, from the read that is waited for, once the main thread is where it waits: before that, Python might
    drop what comes while the garbage collector calls back, and a second one would hit what tidies up after the first.
    """
    main, read_into, sent = threading.main_thread().ident, WeightFile.read_into, threading.Event()
    assert main is not None

    def interrupting(*args: Any) -> None:
        if armed and not sent.is_set():
            while not any(is_running(wait.__code__, main) for wait in (RoomChanged.wait, Outcome.wait)):
                time.sleep(0.001)
            sent.set()
            signal.pthread_kill(main, signal.SIGINT)
        read_into(*args)

    armed = False
    with stream(folder, layers_per_batch=1, prefetch_batches=0) as model:
        model(IDS)
        monkeypatch.setattr(WeightFile, "read_into", interrupting)
        armed = True
        with pytest.raises(KeyboardInterrupt):
            model.generate(IDS, **ENDLESS)
        assert sent.is_set()
        assert_nothing_bound(model)
        assert torch.equal(model(IDS).logits, reference(IDS).logits)


def test_a_generation_abandoned_half_way(model: Any, reference: Any) -> None:
    def leave(count: int) -> None:
        if count == 4:
            raise Mishap

    with pytest.raises(Mishap):
        model.generate(IDS, streamer=Signals(leave), **ENDLESS)
    assert_nothing_bound(model)
    assert_works(model, reference)


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
def test_a_failed_read_is_reported_and_tried_again(
    folder: Path, reference: Any, sim: SimDevice, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    with stream(folder, device, layers_per_batch=1, prefetch_batches=0) as model:
        with monkeypatch.context() as patch:
            patch.setattr(WeightFile, "read_into", failing_read)
            for _ in range(2):
                with pytest.raises(ReadError, match="the disk is gone"):
                    model(IDS.to(model.device))
                assert_nothing_bound(model)
        expected = (reference if device == "cpu" else on_accelerator(reference))(IDS).logits
        assert torch.equal(model(IDS.to(model.device)).logits.cpu(), expected)


def failing_read(*_: object) -> None:
    raise ReadError("the disk is gone")


def test_a_failed_conversion_is_done_again(converting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is as large as the model: what is in it stays there, and must not be taken for converted."""
    reference = AutoModelForCausalLM.from_pretrained(converting)
    with stream(converting, layers_per_batch=1, prefetch_batches=3) as model:
        with monkeypatch.context() as patch:
            patch.setattr(DelicateTranspose, "fails", True)
            with pytest.raises(Mishap):
                model(IDS)
        assert_nothing_bound(model)
        assert_works(model, reference)


def test_no_thread_stays_when_loading_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, readers: Readers) -> None:
    monkeypatch.setattr(WeightFile, "read_into", failing_read)
    with pytest.raises(ReadError):
        stream(folder)
    assert readers() == []
    assert open_files(folder) == []


@pytest.mark.parametrize(("owner", "name"), [(streamed, "_change_class"), (auto, "Engine")], ids=["made", "opened"])
def test_no_thread_stays_when_loading_is_interrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, readers: Readers, owner: Any, name: str
) -> None:
    """Nobody has the model then, to close it; the traceback may keep it, so that it is not collected."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        stream(folder)
    assert raised.tb is not None
    assert readers() == []
    assert open_files(folder) == []


# --------------------------------------------------------------------------------------------------------- side by side


def test_two_models_take_turns(tiny: WriteTiny, resident: Resident) -> None:
    names = ("llama", "qwen3_moe")
    with stream(tiny("llama", FP32), **SMALL_STEPS) as one, stream(tiny("qwen3_moe", FP32), **SMALL_STEPS) as other:
        assert chat(one, other) == chat(*(resident(name, FP32, FP32) for name in names))


def chat(*models: Any) -> list[int]:
    """Greedy tokens, by one model after the other, each with a cache of its own."""
    tokens, caches = IDS.flatten().tolist(), [None] * len(models)
    done = [0] * len(models)
    for turn in range(12):
        which = turn % len(models)
        output = models[which](
            torch.tensor([tokens[done[which] :]]), use_cache=True, **cache_in(models[which], caches[which])
        )
        caches[which], done[which] = cache_of(output), len(tokens)
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens


def test_calls_from_several_threads_wait_for_each_other(model: Any, reference: Any) -> None:
    inside, most_inside = 0, 0

    def enter(*_: object) -> None:
        nonlocal inside, most_inside
        inside += 1
        most_inside = max(most_inside, inside)
        time.sleep(0.001)

    def leave(*_: object) -> None:
        nonlocal inside
        inside -= 1

    for layer in model.model.layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    inputs = [torch.randint(3, VOCAB_SIZE, (1, length)) for length in (5, 9, 14, 3)]
    by_generate = [InThread(partial(model.generate, ids, **GREEDY)) for ids in inputs]
    by_call = [InThread(partial(model, ids)) for ids in inputs * 5]
    for ids, call in zip(inputs, by_generate, strict=True):
        assert torch.equal(call.finish().result, reference.generate(ids, **GREEDY))
    for ids, call in zip(inputs * 5, by_call, strict=True):
        assert torch.equal(call.finish().result.logits, reference(ids).logits)
    assert most_inside == 1


# -------------------------------------------------------------------------------------------------------------- memory

LARGE = TinyModel(
    "llama",
    LLAMA
    | {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5}
    | {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False},
)
"""A checkpoint of 186 MB in bfloat16, whose layers are large against everything else."""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_model(LARGE, folder, torch.bfloat16)
    return folder


CLOSE = """
import json, sys, psutil, torch
from airstream import AutoModel

def resident():
    return psutil.Process().memory_info().rss

before = resident()
options = dict(device="cpu", layers_per_batch=1, prefetch_batches=1, max_context=128, page_cache=False)
model = AutoModel.from_pretrained(sys.argv[1], max_memory=sys.argv[2], **options)
model(torch.arange(3, 15)[None])
opened, ring = resident(), model.plan.ring_bytes
model.close()
print(json.dumps({"rise": opened - before, "fall": opened - resident(), "ring": ring}))
"""


def test_closing_gives_the_memory_back(large_folder: Path) -> None:
    """In a process of its own: one that has run other tests gives back theirs at any moment."""
    least = smallest_budget(large_folder, layers_per_batch=1, prefetch_batches=1, max_context=128, page_cache=False)
    command = [sys.executable, "-c", CLOSE, str(large_folder), str(least["cpu"])]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["ring"] > 30 << 20
    assert measured["rise"] > measured["ring"]
    assert measured["fall"] > 0.95 * measured["ring"]


MEASURE = """
import json, sys, psutil, torch
from airstream import AutoModel

def peak():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) << 10

torch.set_num_threads(2)
folder, budget, kernels = *sys.argv[1:3], (*sys.argv[3:], "exact")[0]
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = psutil.Process().memory_info().rss
options = dict(device="cpu", max_memory=budget, layers_per_batch=1, max_context=128, page_cache=False, kernels=kernels)
with AutoModel.from_pretrained(folder, **options) as model:
    prompt = torch.arange(3, 103)[None]
    model.generate(prompt, do_sample=False, min_new_tokens=28, max_new_tokens=28)
    plan = model.plan
print(json.dumps({"rise": peak() - before, "planned": plan.peak_bytes["cpu"], "ring": plan.ring_bytes}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
@pytest.mark.parametrize("budget", ["smallest", "400MiB"])
def test_the_peak_stays_within_the_plan(large_folder: Path, budget: str) -> None:
    """The memory that a process takes when it streams, as its kernel counts it."""
    if budget == "smallest":
        budget = str(smallest_budget(large_folder, layers_per_batch=1, max_context=128, page_cache=False)["cpu"])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_folder), budget], capture_output=True, text=True, check=True
    )
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["rise"] > measured["ring"]
    assert measured["rise"] <= measured["planned"]
    assert measured["planned"] <= int(budget.removesuffix("MiB")) << 20


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
@pytest.mark.parametrize("options", [{}, {"max_context": 64}, {"prefetch_batches": 2}], ids=str)
def test_a_budget_too_small_is_refused_before_anything_is_read(
    folder: Path,
    reference: Any,
    sim: SimDevice,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    device: str,
) -> None:
    smallest = smallest_budget(folder, device, **options)
    with monkeypatch.context() as patch:
        patch.setattr("airstream.transfer.opening.Reader", lambda *_: pytest.fail("weights would have been read"))
        for tier, size in smallest.items():
            less = f"{int(size.removesuffix('MiB')) - 1}MiB"
            with pytest.raises(BudgetError, match="does not fit"):
                stream(folder, device, max_memory={**smallest, tier: less}, **options)
    with stream(folder, device, max_memory=smallest, **options) as model:
        tokens = model.generate(IDS.to(model.device), **GREEDY).cpu()
    expected = reference if device == "cpu" else on_accelerator(reference)
    assert torch.equal(tokens, expected.generate(IDS, **GREEDY))


def test_a_call_beyond_the_budget_is_refused_before_it_begins(folder: Path, reference: Any) -> None:
    """And the model goes on working."""
    with stream(folder, max_memory=smallest_budget(folder, max_context=64), max_context=64) as model:
        acquired = model.stats.acquired
        with pytest.raises(BudgetError, match="max_memory"):
            model(torch.ones(4000, 200, dtype=torch.long))
        assert model.stats.acquired == acquired
        assert_works(model, reference)


def test_importing_is_silent_and_cheap() -> None:
    code = "import sys, airstream; print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_every_public_name_is_there() -> None:
    assert all(getattr(airstream, name) is not None for name in airstream.__all__)
    with pytest.raises(AttributeError, match="no attribute 'AutoModels'"):
        _ = airstream.AutoModels


@pytest.mark.parametrize("prefetch_batches", [0, 2])
def test_an_interrupt_may_come_while_reads_are_begun(
    tiny: WriteTiny, monkeypatch: pytest.MonkeyPatch, prefetch_batches: int
) -> None:
    """Nobody fills what was interrupted before its reads were handed over: the next pass must not wait for it."""
    with stream(tiny("llama", torch.float32), prefetch_batches=prefetch_batches) as model:
        expected = model(IDS).logits
        real, left = streamer.Filling, [0]

        def interrupted(*args: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(streamer, "Filling", interrupted)
        for number in range(1, 6):
            left[0] = number
            with pytest.raises(KeyboardInterrupt):
                [model(IDS) for _ in range(3)]  # the last of so many fills may be read ahead for the next pass
            assert torch.equal(model(IDS).logits, expected)


def test_a_file_that_is_written_into_while_it_is_loaded_is_told(tiny: WriteTiny, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny("llama", torch.float32), folder)
    with stream(folder) as model:
        model(IDS)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))
        with pytest.raises(CheckpointError, match="replaced or changed meanwhile"):
            model(IDS)


def test_a_hook_may_close_the_model_that_calls_it(tiny: WriteTiny) -> None:
    model = stream(tiny("llama", torch.float32))
    returned: list[bool] = []

    def close(*_: object) -> None:
        model.close()
        returned.append(True)

    model.model.layers[1].register_forward_hook(close)
    with pytest.raises(ClosedError, match="the model is closed"):
        model(torch.arange(5, 9)[None])
    assert returned == [True]
    assert model._engine._executor is None
