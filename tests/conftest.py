"""What all tests share: quiet libraries, tiny checkpoints and their resident models, the simulated accelerator."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs the hub

import copy
import functools
import re
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
from airstream.backend import RUNTIMES
from tests.realmodel import smollm2_folder  # noqa: F401 - a fixture
from tests.sim import SimDevice, SimRuntime
from tests.tiny_models import write_tiny

torch.set_num_threads(2)
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
        return AutoModelForCausalLM.from_pretrained(tiny(name, stored), dtype=dtype).eval().requires_grad_(False)

    return model_of


@contextmanager
def simulated_accelerator(memory_limit: int | None = None, raise_races: bool = True) -> Iterator[SimDevice]:
    """`sim:0` as a device of airstream's. Close its models inside."""
    with SimDevice(memory_limit, raise_races) as device:
        RUNTIMES["sim"] = lambda _: SimRuntime(device)
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
    """The model in `folder`, streamed. By default to the CPU: torch's default is the simulated one once it knows it."""
    if device == "sim:0":
        options.setdefault("max_memory", {0: "1GiB", "cpu": "1GiB"})
    return AutoModel.from_pretrained(folder, device=device, **options)


def smallest_budget(folder: Path, device: str = "cpu", **options: Any) -> dict[int | str, str]:
    """The max_memory that the refusal of one that is too small names."""
    too_small = {"cpu": 1} if device == "cpu" else {"cpu": 1, 0: 1}
    with pytest.raises(BudgetError) as refusal:
        AutoModel.plan(folder, device=device, **(options | {"max_memory": too_small}))
    (named,) = re.findall(r"max_memory=\{(.*)\}", str(refusal.value))
    sizes = re.findall(r'(?:"(\w+)"|(\d+)): "(\w+)"', named)
    return {word or int(number): size for word, number, size in sizes}


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
