"""A runtime has the handful of operations of a device that the accelerator backend is written in.

Memory, streams, events, asynchronous copies: so few that a test can put a simulated device under the very code that
drives CUDA. It refuses to know what is moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from airstream.transfer.host_memory import HostBuffer


class Event(Protocol):
    """A point in a stream, as `torch.Event`."""

    def synchronize(self) -> None:
        """Block the host until the stream has reached this point; at once if it was never recorded."""

    def query(self) -> bool:
        """Whether the stream has reached this point."""


class Stream(Protocol):
    """An ordered queue of device work, as `torch.Stream`."""

    def record_event(self, event: Any) -> Any:
        """Move `event` to the end of this stream's queue."""

    def wait_event(self, event: Any) -> None:
        """Let what is queued from now on wait for `event`, without blocking the host."""


DeviceWork = Callable[[torch.Tensor, torch.Tensor], None]
"""Torch operations that write the first tensor and read the second."""


class Runtime(Protocol):
    """The device operations that the accelerator backend is written in."""

    device: torch.device

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised uint8 device memory of `nbytes`."""

    def pin(self, buffer: HostBuffer) -> bool:
        """Make host memory ready for asynchronous copies; False where the system refuses, and it stays pageable."""

    def unpin(self, buffer: HostBuffer) -> None:
        """Undo `pin`."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queue a copy of a host uint8 tensor to the device on `stream`; `source` must stay as it is until it ran."""

    def compute(self, destination: torch.Tensor, source: torch.Tensor, work: DeviceWork, stream: Any) -> None:
        """Queue `work(destination, source)`, of uint8 device memory, on `stream`. What it allocates belongs to that."""

    def new_stream(self) -> Stream:
        """A stream of its own, for copies."""

    def new_event(self) -> Event:
        """An event that has not been recorded yet."""

    def new_timer(self) -> Event:
        """An event that notes when it is passed."""

    def elapsed_seconds(self, start: Any, end: Any) -> float:
        """From when timer `start` was passed until `end` was; negative if `end` was first."""

    def used_bytes(self) -> int:
        """Device memory in use."""

    def peak_bytes(self) -> int:
        """The most device memory that has been in use, since `forget_peak`."""

    def forget_peak(self) -> None:
        """Let `peak_bytes` begin anew."""

    def compute_stream(self) -> Stream:
        """The stream on which the calling thread submits computations."""

    def synchronize(self) -> None:
        """Block until every stream of the device is empty."""


RUNTIMES: dict[str, Callable[[torch.device], Runtime]] = {}
"""Runtimes of device types that torch's own streams and events do not serve, by type."""
