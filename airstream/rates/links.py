"""This measures how fast memory is copied: within the host, and to a device and back.

It knows the two kinds of host memory and a device's runtime, which is the backend's own. It refuses to know weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from airstream.rates.effort import Effort, seconds_per_call, timed
from airstream.reporting.units import MIB
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.reader import CHUNK_BYTES
from airstream.transfer.runtime import Runtime
from airstream.transfer.torch_runtime import runtime_of

__all__ = ["LinkSpeed", "measure_bus", "measure_host_copy", "measure_pinned"]

QUICK_BYTES = 256 * MIB
"""Copied in a quick measurement, again and again from the same place."""

QUICK_SECONDS = 0.001
"""A first copy that takes longer is long enough to be timed alone."""

Copy = Callable[[torch.Tensor, torch.Tensor], None]
"""Queues a copy of as many bytes of host memory (first) as of device memory (second), one way or the other."""


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Bytes per second to a device and back."""

    h2d: float
    d2h: float


def measure_host_copy(effort: Effort) -> float:
    """Bytes per second that one copy in host memory moves; each is read once and written once. Blocks meanwhile.

    Peak host bytes: twice `effort.copy_bytes`.
    """
    source, destination = HostBuffer(effort.copy_bytes).tensor, HostBuffer(effort.copy_bytes).tensor
    source.zero_()
    destination.zero_()  # touched, so that no page fault is timed
    seconds = seconds_per_call(lambda: destination.copy_(source), lambda: None, effort.seconds)
    return effort.copy_bytes / seconds


def measure_bus(device: torch.device, pin: bool, effort: Effort) -> LinkSpeed:
    """Copy to `device` and back, in pieces as large as the reader's, one behind the other. Blocks meanwhile.

    Peak bytes: `effort.pinned_bytes` of host memory, `effort.copy_bytes` on the device.

    Args:
        pin: whether to pin the host memory. Where that is refused, pageable memory is measured.
    """
    runtime = runtime_of(device)
    buffer = HostBuffer(effort.pinned_bytes)
    buffer.tensor.zero_()
    pinned = pin and runtime.pin(buffer)
    try:
        return _speeds(runtime, buffer.tensor, effort)
    finally:
        runtime.synchronize()  # no copy may be under way when the memory goes
        if pinned:
            runtime.unpin(buffer)


def measure_pinned(device: torch.device) -> float | None:
    """Bytes per second from pinned host memory to `device`, measured quickly; None where that cannot be had.

    Blocks for some ten milliseconds, as long as `QUICK_BYTES` take or a first read's worth. Peak bytes: 8 MiB of host
    memory, and as much on the device.
    """
    runtime = runtime_of(device)
    buffer = HostBuffer(CHUNK_BYTES)
    if not runtime.pin(buffer):
        return None
    try:
        memory, stream = runtime.empty(CHUNK_BYTES), runtime.new_stream()
        timed(lambda: runtime.copy(memory[:PAGE_BYTES], buffer.tensor[:PAGE_BYTES], stream), runtime.synchronize)
        copies = 1  # the one before has brought everything up
        seconds = timed(lambda: runtime.copy(memory, buffer.tensor, stream), runtime.synchronize)
        if seconds < QUICK_SECONDS:
            copies = QUICK_BYTES // CHUNK_BYTES
            seconds = timed(lambda: runtime.copy(memory, buffer.tensor, stream), runtime.synchronize, copies)
        return copies * CHUNK_BYTES / seconds
    except torch.OutOfMemoryError:
        return None  # a device without so much to spare has other worries
    finally:
        runtime.synchronize()
        runtime.unpin(buffer)


def _speeds(runtime: Runtime, host: torch.Tensor, effort: Effort) -> LinkSpeed:
    memory = runtime.empty(effort.copy_bytes)
    stream = runtime.new_stream()

    def to_device(here: torch.Tensor, there: torch.Tensor) -> None:
        runtime.copy(there, here, stream)

    def to_host(here: torch.Tensor, there: torch.Tensor) -> None:
        here.copy_(there, non_blocking=True)

    def rate(copy: Copy) -> float:
        seconds = seconds_per_call(lambda: _copy_all(copy, host, memory), runtime.synchronize, effort.seconds)
        return effort.copy_bytes / seconds

    return LinkSpeed(h2d=rate(to_device), d2h=rate(to_host))


def _copy_all(copy: Copy, host: torch.Tensor, memory: torch.Tensor) -> None:
    """Copy as many bytes as `memory` has; `host`, which is smaller, is gone through again and again."""
    step = min(CHUNK_BYTES, host.numel())
    for start in range(0, memory.numel(), step):
        there = memory[start : start + step]
        begin = start % (host.numel() // step * step)
        copy(host[begin : begin + there.numel()], there)
