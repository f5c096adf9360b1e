"""A disk that misbehaves at any one read: the same logits, or one error of ours, and the next pass is right again."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from airstream.errors import AirstreamError
from airstream.transfer import files
from airstream.transfer.reader import Reader
from tests.conftest import simulated_accelerator, stream

pytestmark = pytest.mark.skipif(not files.HAS_PREADV, reason="there is no preadv to disturb")

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=136,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
IDS = torch.tensor([[5, 17, 42, 7, 23]])
SETTINGS: dict[str, Any] = {"page_cache": False, "max_context": 32, "max_batch_size": 1, "prefetch_batches": 0}

Read = Callable[[int, list[Any], int], int]
Disturbance = Callable[[Read, int, list[Any], int], int]


def failing(code: int) -> Disturbance:
    def disturb(read: Read, descriptor: int, buffers: list[Any], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    return disturb


def short_by(granule: int) -> Disturbance:
    """A read that gives half of what it could, in whole granules."""

    def disturb(read: Read, descriptor: int, buffers: list[Any], offset: int) -> int:
        (view,) = buffers
        spare = bytearray(view)
        count = read(descriptor, buffers, offset)
        kept = count // 2 // granule * granule or count
        view[kept:] = spare[kept:]  # a short read leaves the rest as it was
        return kept

    return disturb


DISTURBANCES: dict[str, tuple[Disturbance, bool]] = {
    "EINVAL": (failing(errno.EINVAL), False),
    "EIO": (failing(errno.EIO), True),
    "EINTR": (failing(errno.EINTR), True),
    "a short read": (short_by(512), False),
    "a shorter read": (short_by(1), True),
}
"""What happens at one read, and whether it may be an error. EINVAL is how a file system refuses a direct read."""


class Disk:
    """Counts reads, and disturbs one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.disturbed = 0
        self._real: Read = os.preadv
        self._lock = threading.Lock()
        self._at, self._disturb = -1, failing(0)

    def disturb(self, at: int, disturbance: Disturbance) -> None:
        self.count = self.disturbed = 0
        self._at, self._disturb = at, disturbance

    def __call__(self, descriptor: int, buffers: list[Any], offset: int) -> int:
        with self._lock:
            is_disturbed = self.count == self._at
            self.count += 1
            self.disturbed += is_disturbed
        if is_disturbed:
            return self._disturb(self._real, descriptor, buffers, offset)
        return self._real(descriptor, buffers, offset)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose tensors start and end anywhere in a page."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(folder, max_shard_size=500_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(os, "preadv", disk)
    return disk


@pytest.fixture(params=["cpu", "sim"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu":
        yield "cpu"
        return
    with simulated_accelerator():
        yield "sim"


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


CASES = [(what, torch.float32) for what in DISTURBANCES] + [("EINVAL", torch.bfloat16)]  # the last one is cast


@pytest.mark.parametrize(("what", "dtype"), CASES, ids=lambda value: str(value))
def test_every_read_of_a_pass(checkpoint: Path, device: str, what: str, dtype: torch.dtype, disk: Disk) -> None:
    disturbance, may_fail = DISTURBANCES[what]
    with stream(checkpoint, device, **(SETTINGS | {"dtype": dtype})) as model:
        expected = logits_of(model)
        disk.disturb(-1, disturbance)
        assert torch.equal(logits_of(model), expected)
        num_reads, is_direct = disk.count, model._engine.machinery.reader.direct
        assert num_reads >= 8
        for at in range(num_reads):
            go_direct(model._engine.machinery.reader)
            disk.disturb(at, disturbance)
            error = error_of_a_pass(model, expected)
            assert disk.disturbed == 1, f"there was no read {at} of {num_reads}"
            assert may_fail or not is_direct or error is None, f"at read {at}: {error}"
            if error is not None:
                assert error_of_a_pass(model, expected) is None, "it has not recovered"


def go_direct(reader: Reader) -> None:
    """Let files that have fallen back be direct again, as if they had been opened just now."""
    for file in reader._files.values():
        file.close()
        file.direct = hasattr(os, "O_DIRECT")


def error_of_a_pass(model: Any, expected: torch.Tensor) -> AirstreamError | None:
    """What a pass raises; if it raises nothing, the logits have to be right."""
    try:
        logits = logits_of(model)
    except AirstreamError as error:
        return error
    assert torch.equal(logits, expected), "wrong logits without a word"
    return None
