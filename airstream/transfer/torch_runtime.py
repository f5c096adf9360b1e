"""The runtime of real accelerators, in the device-agnostic terms of torch: CUDA, ROCm, XPU."""

from __future__ import annotations

from typing import Any

import torch

from airstream.transfer.base import DeviceWork
from airstream.transfer.host_memory import HostBuffer


class TorchRuntime:
    """Streams, events and memory of one `torch.accelerator` device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pin(self, buffer: HostBuffer) -> bool:
        if self.device.type != "cuda":
            return False  # registering foreign memory is a CUDA (and ROCm) notion
        with torch.cuda.device(self.device):  # a thread's own is the first card, where this would begin a context
            code = _cudart().cudaHostRegister(buffer.tensor.data_ptr(), buffer.nbytes, 0)
        return int(code) == 0

    def unpin(self, buffer: HostBuffer) -> None:
        with torch.cuda.device(self.device):
            _cudart().cudaHostUnregister(buffer.tensor.data_ptr())

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        with stream:
            destination.copy_(source, non_blocking=True)

    def compute(self, destination: torch.Tensor, source: torch.Tensor, work: DeviceWork, stream: Any) -> None:
        with stream:
            work(destination, source)

    def new_stream(self) -> Any:
        return torch.Stream(self.device)

    def new_event(self) -> Any:
        return torch.Event(self.device)

    def new_timer(self) -> Any:
        return torch.Event(self.device, enable_timing=True)

    def elapsed_seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3

    def used_bytes(self) -> int:
        return torch.accelerator.memory_allocated(self.device)

    def peak_bytes(self) -> int:
        return torch.accelerator.max_memory_allocated(self.device)

    def forget_peak(self) -> None:
        torch.accelerator.reset_peak_memory_stats(self.device)

    def compute_stream(self) -> Any:
        return torch.accelerator.current_stream(self.device)

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self.device)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
