"""This says what the streamer asks of a device.

A `Backend` moves the bytes of a layer batch into memory the model computes from and keeps copies and computation from
overtaking each other. What the backend of an accelerator asks in its turn is another seam: `runtime.py`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from airstream.reporting.probe import Moment
from airstream.transfer.crossing import Crossing
from airstream.transfer.packing import Packing
from airstream.transfer.piece import Landing


class Backend(ABC):
    """Memory of one device and the order of what happens to it.

    The life of a layer batch: `begin_fill` (the ring's bytes may be overwritten from here on), reads that land through
    `landing`, `end_fill` when the last of them has landed, `wait_filled` before the model computes with it, and
    `mark_computed` once its last computation has been submitted. None of these blocks the host.
    """

    device: torch.device
    packing: Packing
    """How tensors must lie in a slab so that reads land without a detour and kernels find them aligned."""

    @abstractmethod
    def allocate(self, nbytes: int, touch: bool = True) -> torch.Tensor:
        """A uint8 tensor of `nbytes` on the device, touched, so that the token loop neither faults nor allocates.

        What is filled only once need not be touched before: `touch=False` leaves it to the reads that fill it.

        Raises:
            BudgetError: there is not so much.
        """

    @abstractmethod
    def landing(self, memory: torch.Tensor) -> Landing:
        """Where reads into `memory`, a part of what `allocate` gave, land."""

    @abstractmethod
    def new_fence(self) -> Any:
        """Something to be given to `end_fill` and `wait_filled`, any number of times. Made outside the token loop."""

    @abstractmethod
    def begin_fill(self) -> None:
        """Order all copies that follow behind the computations marked so far."""

    @abstractmethod
    def end_fill(self, fence: Any) -> None:
        """Put `fence` behind all copies so far."""

    @abstractmethod
    def wait_filled(self, fence: Any) -> None:
        """Order the computation that follows in the calling thread behind `fence`."""

    @abstractmethod
    def mark_computed(self) -> None:
        """Mark the computation submitted so far, by the calling thread, as the last reader of what it has read."""

    def allocate_host(self, nbytes: int) -> HostedMemory:
        """Host memory for weights that cross to the device on every pass. Only where device and host are two."""
        raise NotImplementedError("host and device memory are one here: there is nothing to copy")

    def wait_pinned(self) -> None:  # noqa: B027 - where nothing is copied, nothing makes copies faster
        """Block until copies from host memory are as fast as they are going to be. Never called in the token loop."""

    def is_worker(self, thread: threading.Thread) -> bool:  # noqa: ARG002
        """Whether `thread` is one that `close` waits for."""
        return False

    @abstractmethod
    def moment(self) -> Moment:
        """For profiles: the point that the computation submitted so far, by the calling thread, leads to."""

    def wait_computed(self) -> None:  # noqa: B027 - where computation is done when it returns, there is nothing to do
        """Block until what the calling thread has submitted so far is done. Only while profiling, after a pass."""

    def start_clock(self) -> None:  # noqa: B027 - a backend whose moments are seconds has nothing to do
        """Make `seconds` right for moments from here on. Blocks as `wait_computed` does."""

    @abstractmethod
    def seconds(self, moments: Sequence[Moment]) -> list[float | None]:
        """Each of `moments` on the clock `probe.now`, None for what has not happened yet.

        The others have been dealt with: they are not to be asked for again.
        """

    def used_bytes(self) -> int:
        """Device memory in use, where that is not the host's."""
        return 0

    def peak_bytes(self) -> int:
        """The most of it that has been in use, since `forget_peak`."""
        return 0

    def forget_peak(self) -> None:  # noqa: B027 - the host has no such memory
        """Let `peak_bytes` begin anew."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until the device has done all that was submitted. Never called in the token loop."""

    @abstractmethod
    def close(self) -> None:
        """Give back everything but the tensors handed out. Idempotent."""


class HostedMemory(Protocol):
    """Host memory from which weights are copied to the device, again and again."""

    nbytes: int

    def landing(self) -> Landing:
        """Where reads that fill it land; they are about to begin. Does not block."""

    def send(self, memory: torch.Tensor, crossings: Sequence[Crossing]) -> Sequence[Callable[[int], None]]:
        """Queue `crossings` to `memory`, uint8 on the device. Does not block.

        Returns:
            Errands for reader threads, without which some are not queued; none if all of them are.
        """

    def close(self) -> None:
        """Give it back. Idempotent; no copy may be under way."""
