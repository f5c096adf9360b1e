"""This is the runtime of real accelerators, in the device-agnostic terms of torch: CUDA, ROCm, XPU.

It knows streams, events and memory of one device. It refuses to know what is copied.
"""

from __future__ import annotations

from typing import Any

import torch

from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.runtime import RUNTIMES, DeviceWork, Runtime


class TorchRuntime:
    """Streams, events and memory of one `torch.accelerator` device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised uint8 memory of `nbytes` on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pin(self, buffer: HostBuffer) -> bool:
        """Register host memory with CUDA; False on other devices, or where the system refuses."""
        if self.device.type != "cuda":
            return False  # registering foreign memory is a CUDA (and ROCm) notion
        with torch.cuda.device(self.device):  # a thread's own is the first card, where this would begin a context
            code = _cudart().cudaHostRegister(buffer.tensor.data_ptr(), buffer.nbytes, 0)
        return int(code) == 0

    def unpin(self, buffer: HostBuffer) -> None:
        """Undo `pin`."""
        with torch.cuda.device(self.device):
            _cudart().cudaHostUnregister(buffer.tensor.data_ptr())

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queue a copy from the host to the device on `stream`. Does not block if `source` is pinned."""
        with stream:
            destination.copy_(source, non_blocking=True)

    def compute(self, destination: torch.Tensor, source: torch.Tensor, work: DeviceWork, stream: Any) -> None:
        """Queue `work(destination, source)` on `stream`."""
        with stream:
            work(destination, source)

    def new_stream(self) -> Any:
        """A new stream of the device."""
        return torch.Stream(self.device)

    def new_event(self) -> Any:
        """A new event, not recorded yet."""
        return torch.Event(self.device)

    def new_timer(self) -> Any:
        """A new event that notes when it is passed."""
        return torch.Event(self.device, enable_timing=True)

    def elapsed_seconds(self, start: Any, end: Any) -> float:
        """Seconds from when `start` was passed until `end` was."""
        return start.elapsed_time(end) / 1e3

    def used_bytes(self) -> int:
        """Bytes of the device that torch's allocator has given out."""
        return torch.accelerator.memory_allocated(self.device)

    def peak_bytes(self) -> int:
        """The most of them, since `forget_peak`."""
        return torch.accelerator.max_memory_allocated(self.device)

    def forget_peak(self) -> None:
        """Let `peak_bytes` begin anew."""
        torch.accelerator.reset_peak_memory_stats(self.device)

    def compute_stream(self) -> Any:
        """The current stream of the calling thread."""
        return torch.accelerator.current_stream(self.device)

    def synchronize(self) -> None:
        """Block until all streams of the device are empty."""
        torch.accelerator.synchronize(self.device)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def runtime_of(device: torch.device) -> Runtime:
    """The operations of `device`, which must be there."""
    return RUNTIMES.get(device.type, TorchRuntime)(device)
