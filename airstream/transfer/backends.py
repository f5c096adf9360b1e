"""`create_backend` chooses the backend of a device: what memory it has and how bytes get there.

This knows types of devices. It refuses to know what is moved.
"""

from __future__ import annotations

import torch

from airstream.reporting.probe import Probe
from airstream.transfer.accelerator import AcceleratorBackend
from airstream.transfer.base import Backend
from airstream.transfer.cpu import CpuBackend
from airstream.transfer.torch_runtime import runtime_of


def create_backend(
    device: torch.device, num_workers: int, chunk_bytes: int, probe: Probe | None = None, packed: bool = False
) -> Backend:
    """The backend of `device`, for a reader of `num_workers` threads that reads `chunk_bytes` at a time.

    What it copies and converts, `probe` is told. `packed`: blocks of packed weights come, and are decoded there.
    """
    if device.type == "cpu":
        return CpuBackend(chunk_bytes, probe)
    return AcceleratorBackend(runtime_of(device), num_workers, chunk_bytes, probe, packed)
