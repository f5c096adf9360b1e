"""What all tests share: quiet libraries, tiny checkpoints and their resident models, the simulated accelerator."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs the hub
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is: workers side by side do not spin for each other

import copy
import functools
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from airstream import AutoModel, BudgetError
from airstream.compat.traits import CACHE_KEYWORDS, cache_keyword
from airstream.loading.options import LoadOptions
from airstream.loading.prepare import prepare
from airstream.plan.planner import smallest_plan
from airstream.transfer.runtime import RUNTIMES
from tests.stand_ins.realmodel import smollm2_folder  # noqa: F401 - a fixture
from tests.stand_ins.sim import SimDevice, SimRuntime
from tests.stand_ins.tiny_models import write_tiny

torch.set_num_threads(2)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

WriteTiny = Callable[[str, torch.dtype], Path]
Resident = Callable[[str, torch.dtype, torch.dtype], Any]
Readers = Callable[[], list[threading.Thread]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> WriteTiny:
    """`tiny(name, dtype)`: the folder of a tiny checkpoint stored in `dtype`, written when first asked for."""
    root = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def folder_of(name: str, dtype: torch.dtype) -> Path:
        folder = root / f"{name}-{dtype}"
        write_tiny(name, folder, dtype)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def resident(tiny: WriteTiny) -> Resident:
    """`resident(name, stored, dtype)`: the model as transformers loads it, which all results are compared with."""

    @functools.cache
    def model_of(name: str, stored: torch.dtype, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny(name, stored), dtype=dtype).eval()

    return model_of


@contextmanager
def simulated_accelerator(
    memory_limit: int | None = None, raise_races: bool = True, is_pinnable: bool = True, **times: Any
) -> Iterator[SimDevice]:
    """`sim:0` as a device of airstream's, as slow as `times` say. Close its models inside."""
    with SimDevice(memory_limit, raise_races, **times) as device:
        RUNTIMES["sim"] = lambda _: SimRuntime(device, is_pinnable)
        try:
            yield device
        finally:
            del RUNTIMES["sim"]


@pytest.fixture
def sim() -> Iterator[SimDevice]:
    """The simulated accelerator, for one test; races fail it."""
    with simulated_accelerator() as device:
        yield device


def stream(folder: Path, device: str = "cpu", **options: Any) -> Any:
    """The model in `folder`, within so little memory that all of its layers are streamed, unless `options` say more.

    By default to the CPU: torch's default is the simulated accelerator once it knows it.
    """
    options = STREAMING | options
    options.setdefault("max_memory", least_memory(folder, device, **options))
    return AutoModel.from_pretrained(folder, device=device, **options)


STREAMING: dict[str, Any] = {"layers_per_batch": 1, "prefetch_batches": 1, "max_context": 256, "max_batch_size": 4}


def least_memory(folder: Path, device: str = "cpu", **options: Any) -> dict[int | str, int]:
    """The smallest max_memory that will do, to the byte, with nothing left over for weights that stay."""
    budget = {"cpu": "64GiB"} if device == "cpu" else {"cpu": "64GiB", 0: "64GiB"}
    prepared = prepare(folder, LoadOptions(device=device, **(options | {"max_memory": budget})))
    peaks = smallest_plan(prepared.facts, prepared.request).peak_bytes
    return {int(tier) if tier.isdigit() else tier: nbytes for tier, nbytes in peaks.items()}


def smallest_budget(folder: Path, device: str = "cpu", **options: Any) -> dict[int | str, str]:
    """The max_memory that the refusal of one that is too small names."""
    too_small = {"cpu": "1MiB"} if device == "cpu" else {"cpu": "1MiB", 0: "1MiB"}
    with pytest.raises(BudgetError) as refusal:
        AutoModel.plan(folder, device=device, **(STREAMING | options | {"max_memory": too_small}))
    (named,) = re.findall(r"max_memory=\{(.*)\}", str(refusal.value))
    sizes = re.findall(r'(?:"(\w+)"|(\d+)): "(\w+)"', named)
    return {word or int(number): size for word, number, size in sizes}


def cache_in(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as the argument that this version of transformers wants it as."""
    return {cache_keyword(model): cache}


def cache_of(output: Any) -> Any:
    """The KV cache that a forward pass returns, under the name that this version of transformers gives it."""
    return next(output[name] for name in CACHE_KEYWORDS if name in output)


def on_accelerator(model: Any) -> Any:
    """The resident `model` as an accelerator would compute it, though on the CPU.

    transformers maps weights from the file, wherever they lie in it; a device's allocator aligns each of them. CPU
    kernels sum in another order for the one than for the other.
    """
    return copy.deepcopy(model)


@pytest.fixture
def readers() -> Readers:
    """Gives the reader threads that this test has started and that still run."""
    before = set(_reader_threads())
    return lambda: [thread for thread in _reader_threads() if thread not in before]


@pytest.fixture(autouse=True)
def no_reader_left_behind(readers: Readers) -> Iterator[None]:
    """Fails a test that has not closed a model: its reader threads still run."""
    yield
    deadline = time.monotonic() + 2
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers(), "a model was left open"


def _reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("airstream-reader-")]
