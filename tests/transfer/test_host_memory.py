"""Host memory lies where a disk fills it fastest, and is as large as was asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.host_memory import HUGE_BYTES, HostBuffer

LARGE = 4 * HUGE_BYTES + PAGE_BYTES
"""Of a staging buffer."""


@pytest.mark.parametrize("nbytes", [0, 1, PAGE_BYTES, HUGE_BYTES - 1, HUGE_BYTES, LARGE, LARGE + 5])
def test_a_buffer_is_as_large_as_asked_and_zero(nbytes: int) -> None:
    buffer = HostBuffer(nbytes)
    assert buffer.tensor.shape == (nbytes,)
    assert len(buffer.view) == nbytes
    assert not buffer.tensor.any()
    buffer.tensor[-1:] = 7
    assert buffer.view[-1:] == bytes([7])[:nbytes]  # the same memory


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
@pytest.mark.parametrize("nbytes", [HUGE_BYTES, LARGE])
def test_a_large_buffer_begins_with_a_huge_page(nbytes: int) -> None:
    """Of several, or one would do so by chance."""
    buffers = [HostBuffer(nbytes) for _ in range(4)]
    assert [buffer.tensor.data_ptr() % HUGE_BYTES for buffer in buffers] == [0] * 4


@pytest.mark.parametrize("nbytes", [1, PAGE_BYTES, HUGE_BYTES - PAGE_BYTES])
def test_a_small_buffer_begins_with_a_page(nbytes: int) -> None:
    assert HostBuffer(nbytes).tensor.data_ptr() % PAGE_BYTES == 0


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_nothing_beside_a_buffer_is_touched() -> None:
    """What lies around it costs addresses, and no memory that a budget does not count."""
    before = resident_bytes()
    buffers = [HostBuffer(LARGE) for _ in range(8)]
    assert resident_bytes() - before <= 8 * LARGE + HUGE_BYTES
    assert all(torch.equal(buffer.tensor[:1], torch.zeros(1, dtype=torch.uint8)) for buffer in buffers)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
