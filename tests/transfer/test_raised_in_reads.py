"""Whatever is raised where files are read: on a reader thread, whoever waits has it, nobody hangs, and it is over."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import airstream
from airstream import AutoModel
from airstream.errors import AirstreamError, BudgetError, ReadError, UnsupportedError
from airstream.transfer import files, host_memory
from airstream.transfer.cpu import CpuBackend
from airstream.transfer.landing import HostLanding
from tests.conftest import Resident, WriteTiny, simulated_accelerator, stream
from tests.stand_ins.limits import fail_from_within
from tests.stand_ins.process import reader_threads
from tests.stand_ins.sim import SimStream
from tests.stand_ins.tiny_gguf import write_tiny_gguf
from tests.stand_ins.tiny_models import VOCAB_SIZE

pytestmark = [
    pytest.mark.skipif(not files.HAS_PREADV, reason="there is no preadv to fail"),
    pytest.mark.timeout(60),
]

FP32 = torch.float32
IDS = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(1))
HIDDEN = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"page_cache": False, "prefetch_batches": 0}


def os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


RAISED: Mapping[str, tuple[BaseException, type[BaseException]]] = {
    "MemoryError": (MemoryError(), BudgetError),
    "ENOMEM": (os_error(errno.ENOMEM), BudgetError),
    "EMFILE": (os_error(errno.EMFILE), ReadError),
    "ENFILE": (os_error(errno.ENFILE), ReadError),
    "ESTALE": (os_error(errno.ESTALE), ReadError),
    "EACCES": (os_error(errno.EACCES), ReadError),
    "EIO": (os_error(errno.EIO), ReadError),
    "ENODEV": (os_error(errno.ENODEV), ReadError),
    "SystemExit": (SystemExit(3), SystemExit),
    "KeyboardInterrupt": (KeyboardInterrupt(), KeyboardInterrupt),
}
"""What is raised, and what the caller has of it: one of our errors, or, where somebody wants an end, just that."""

PLACES: Mapping[str, tuple[Any, str]] = {
    "the read": (os, "preadv"),
    "a look at the file": (os, "fstat"),
    "where it lands": (HostLanding, "window"),
    "when it has landed": (HostLanding, "landed"),
}
"""What raises: a function that reader threads call."""

USES: Mapping[str, Callable[[Any], Any]] = {
    "a pass": lambda model: model(IDS),
    "generate": lambda model: model.generate(IDS, max_new_tokens=2),
    "a layer": lambda model: model.model.layers[1].mlp(HIDDEN),
    "the lm_head": lambda model: model.lm_head(HIDDEN),
    "rows of a table": lambda model: model.model.embed_tokens(IDS),
    "a copy of a weight": lambda model: model.model.layers[2].mlp.up_proj.weight.clone(),
    "measure_link": lambda model: model.measure_link(),
}


class Fault:
    """Lets a function raise on reader threads, from then on until `mend`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._error: BaseException | None = None
        self.num_raised = 0

    def put(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            if self._error is not None and threading.current_thread() in reader_threads():
                self.num_raised += 1
                fail_from_within(self._error)
            return real(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, function)

    def begin(self, error: BaseException) -> None:
        self._error, self.num_raised = error, 0

    def mend(self) -> None:
        self._error = None


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return Fault(monkeypatch)


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", FP32)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert reader_threads() == []


def assert_raised(use: Callable[[], Any], expected: type[BaseException], folder: Path) -> None:
    with pytest.raises(BaseException) as caught:
        use()
    assert type(caught.value) is expected, repr(caught.value)
    if issubclass(expected, AirstreamError):
        assert str(folder) in str(caught.value), "the file is not named"


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("place", PLACES)
def test_the_caller_has_it_and_the_model_goes_on(
    folder: Path, resident: Resident, fault: Fault, place: str, what: str
) -> None:
    error, expected = RAISED[what]
    fault.put(*PLACES[place])
    with stream(folder, **SETTINGS) as model:
        for use in USES.values():
            fault.begin(error)
            for _ in range(2):
                assert_raised(lambda use=use: use(model), expected, folder)
            assert fault.num_raised
            fault.mend()
            use(model)
        assert torch.equal(model(IDS).logits, resident("llama", FP32, FP32)(IDS).logits)
        assert not model._engine.gate.turns.is_taken


@pytest.mark.parametrize("what", RAISED)
def test_so_has_whoever_loads_and_nothing_is_left(folder: Path, fault: Fault, what: str) -> None:
    error, expected = RAISED[what]
    fault.put(os, "preadv")
    fault.begin(error)
    assert_raised(lambda: stream(folder, **SETTINGS, max_memory="1GiB"), expected, folder)
    fault.mend()


def test_a_reader_without_a_page_for_edges(folder: Path, resident: Resident, fault: Fault) -> None:
    """It is mapped by the thread that needs it, which has to tell it."""
    fault.put(mmap, "mmap")
    fault.begin(os_error(errno.ENOMEM))
    assert_raised(lambda: stream(folder, **SETTINGS, max_memory="1GiB"), BudgetError, folder)
    fault.mend()
    with stream(folder, **SETTINGS) as model:
        assert torch.equal(model(IDS).logits, resident("llama", FP32, FP32)(IDS).logits)


def test_files_that_cannot_be_opened_again(folder: Path, resident: Resident, fault: Fault) -> None:
    with stream(folder, **SETTINGS) as model:
        fault.put(os, "open")
        for what in ("EMFILE", "ESTALE", "EACCES", "MemoryError"):
            error, expected = RAISED[what]
            for file in model._engine.machinery.reader._files.values():
                file.close()
            fault.begin(error)
            assert_raised(lambda: model(IDS), expected, folder)
            fault.mend()
        assert torch.equal(model(IDS).logits, resident("llama", FP32, FP32)(IDS).logits)


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), MemoryError(), SystemExit(3)], ids=repr)
def test_a_device_that_fails_when_all_has_been_read(
    folder: Path, resident: Resident, fault: Fault, error: BaseException
) -> None:
    """The reader thread that noticed would take the news with it."""
    fault.put(CpuBackend, "end_fill")
    expected = BudgetError if isinstance(error, MemoryError) else type(error)
    with stream(folder, **SETTINGS) as model:
        fault.begin(error)
        for _ in range(2):
            with pytest.raises(expected):
                model(IDS)
        fault.mend()
        assert torch.equal(model(IDS).logits, resident("llama", FP32, FP32)(IDS).logits)


def test_no_more_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "airstream-reader-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(UnsupportedError, match=r"no more threads.*ulimit"):
        stream(folder, **SETTINGS, max_memory="1GiB")


@pytest.mark.parametrize("what", ["MemoryError", "EIO", "SystemExit"])
def test_on_an_accelerator(tiny: WriteTiny, fault: Fault, what: str) -> None:
    folder = tiny("llama", FP32)
    error, expected = RAISED[what]
    fault.put(os, "preadv")
    with simulated_accelerator(), stream(folder, "sim:0", **SETTINGS) as model:
        ids = IDS.to(model.device)
        logits = model(ids).logits.cpu()
        fault.begin(error)
        assert_raised(lambda: model(ids), expected, folder)
        fault.mend()
        assert torch.equal(model(ids).logits.cpu(), logits)


def test_copies_that_a_device_refuses(tiny: WriteTiny, fault: Fault) -> None:
    fault.put(SimStream, "record_event")
    with simulated_accelerator(), stream(tiny("llama", FP32), "sim:0", **SETTINGS) as model:
        ids = IDS.to(model.device)
        logits = model(ids).logits.cpu()
        fault.begin(RuntimeError("the device is gone"))
        with pytest.raises(RuntimeError, match="the device is gone"):
            model(ids)
        fault.mend()
        assert torch.equal(model(ids).logits.cpu(), logits)


# ------------------------------------------------------------------------------------------ what else reads checkpoints

ANSWERS: Mapping[str, tuple[OSError | MemoryError, bool]] = {
    "EACCES": (os_error(errno.EACCES), False),
    "ESTALE": (os_error(errno.ESTALE), False),
    "ENODEV": (os_error(errno.ENODEV), False),
    "ENOMEM": (os_error(errno.ENOMEM), True),
    "MemoryError": (MemoryError(), True),
}
"""What the system says, and whether that is of memory, not of the file."""


@pytest.fixture
def copy(tiny: WriteTiny, tmp_path: Path) -> Path:
    """A checkpoint that may be broken."""
    return Path(shutil.copytree(tiny("llama-sharded", FP32), tmp_path / "checkpoint"))


def answering(owner: Any, name: str, error: BaseException, wanted: Callable[..., bool], patch: Any) -> None:
    """Have a function raise `error` for the arguments that are `wanted`."""
    real = getattr(owner, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        if wanted(*args):
            raise error
        return real(*args, **kwargs)

    patch.setattr(owner, name, function)


@pytest.mark.parametrize("what", ANSWERS)
@pytest.mark.parametrize("call", ["stat", "open"])
def test_verify_names_the_file_that_cannot_be_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch, call: str, what: str
) -> None:
    error, is_memory = ANSWERS[what]
    shard = sorted(copy.glob("*.safetensors"))[0]

    def wanted(path: Any, *_: Any) -> bool:  # headers are read by the main thread
        return path == shard and threading.current_thread() is not threading.main_thread()

    answering(Path if call == "stat" else os, call, error, wanted, monkeypatch)
    if is_memory:
        with pytest.raises(BudgetError, match=shard.name):
            airstream.verify(copy, progress=False)
        return
    (fault,) = airstream.verify(copy, progress=False).faults
    assert str(shard) in fault
    assert os.strerror(error.errno or 0) in fault


@pytest.mark.parametrize("what", ["ENOMEM", "MemoryError"])
@pytest.mark.parametrize("use", ["verify", "repack"])
def test_no_memory_to_read_files_through(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, what: str
) -> None:
    error, _ = ANSWERS[what]
    answering(host_memory, "_map", error, lambda *_: True, monkeypatch)
    arguments = (copy,) if use == "verify" else (copy, tmp_path / "out")
    with pytest.raises(BudgetError, match=r"8\.0 MiB"):
        getattr(airstream, use)(*arguments, progress=False)


@pytest.mark.parametrize("what", ["EACCES", "ESTALE"])
def test_repack_blames_the_small_file_that_it_cannot_read(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """And not the folder that it writes."""
    error, _ = ANSWERS[what]
    file = copy / "vocab.txt"
    file.write_text("a")
    answering(Path, "read_bytes", error, lambda path: path == file, monkeypatch)
    answering(shutil, "copyfile", error, lambda path, *_: path == file, monkeypatch)
    with pytest.raises(ReadError, match=f"reading {file} failed"):
        airstream.repack(copy, tmp_path / "out", progress=False)


def test_repack_of_a_shard_that_goes_meanwhile(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    answering(Path, "open", FileNotFoundError(2, "gone"), lambda path, *_: path == shard, monkeypatch)
    with pytest.raises(AirstreamError, match=shard.name):
        airstream.repack(copy, tmp_path / "out", progress=False)


@pytest.mark.parametrize("what", ANSWERS)
def test_a_gguf_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    error, _ = ANSWERS[what]
    file = write_tiny_gguf("llama", tmp_path / "model.gguf")
    answering(mmap, "mmap", error, lambda *args: args[0] != -1, monkeypatch)
    with pytest.raises(AirstreamError, match=file.name):
        AutoModel.from_pretrained(file, device="cpu")


def test_a_gguf_file_that_is_emptied(tmp_path: Path) -> None:
    file = write_tiny_gguf("llama", tmp_path / "model.gguf")
    file.write_bytes(b"")
    with pytest.raises(AirstreamError, match=f"{file.name} is empty"):
        AutoModel.from_pretrained(file, device="cpu")
