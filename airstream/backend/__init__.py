"""Devices: what memory they have and how bytes get there. `create_backend` chooses the one for a device."""

from __future__ import annotations

import torch

from airstream.backend.accelerator import AcceleratorBackend
from airstream.backend.base import Backend
from airstream.backend.cpu import CpuBackend
from airstream.backend.torch_runtime import TorchRuntime

__all__ = ["AcceleratorBackend", "Backend", "CpuBackend", "create_backend"]


def create_backend(device: torch.device, num_workers: int, chunk_bytes: int) -> Backend:
    """The backend of `device`, for a reader of `num_workers` threads that reads `chunk_bytes` at a time."""
    if device.type == "cpu":
        return CpuBackend(chunk_bytes)
    return AcceleratorBackend(TorchRuntime(device), num_workers, chunk_bytes)
