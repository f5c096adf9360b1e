"""The CPU backend gives the model the memory that reads land in. Nothing is copied, nothing waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from airstream.reporting.probe import Moment, Probe, now
from airstream.transfer.base import Backend
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.landing import HostLanding, Staging
from airstream.transfer.packing import CPU_PACKING


class CpuBackend(Backend):
    """Reads land where the model computes; computation is done when it returns, so that no fence is needed."""

    packing = CPU_PACKING

    def __init__(self, chunk_bytes: int, probe: Probe | None = None) -> None:
        self.device = torch.device("cpu")
        self._staging = Staging(chunk_bytes, probe)

    def allocate(self, nbytes: int, touch: bool = True) -> torch.Tensor:
        return HostBuffer(nbytes, touch).tensor

    def landing(self, memory: torch.Tensor) -> HostLanding:
        return HostLanding(memory, self._staging)

    def new_fence(self) -> None:
        return None

    def begin_fill(self) -> None:
        pass

    def end_fill(self, fence: None) -> None:
        pass

    def wait_filled(self, fence: None) -> None:
        pass

    def mark_computed(self) -> None:
        pass

    def moment(self) -> float:
        return now()

    def seconds(self, moments: Sequence[Moment]) -> list[float | None]:
        return list(moments)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass
