"""`create_backend` chooses the backend of a device: what memory it has and how bytes get there.

This knows types of devices. It refuses to know what is moved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from airstream.codecs.registry import DECODE_SCRATCH_BYTES, HOST_SCRATCH_BYTES
from airstream.reporting.probe import Probe
from airstream.transfer.accelerator import BUFFERS_PER_WORKER, AcceleratorBackend
from airstream.transfer.base import Backend, Packing, Runtime
from airstream.transfer.cpu import CpuBackend
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.torch_runtime import TorchRuntime

__all__ = [
    "RUNTIMES",
    "AcceleratorBackend",
    "Backend",
    "CpuBackend",
    "Packing",
    "create_backend",
    "decoding_bytes",
    "packing_of",
    "staging_bytes",
]

RUNTIMES: dict[str, Callable[[torch.device], Runtime]] = {}
"""Runtimes of device types that torch's own streams and events do not serve, by type."""


def create_backend(
    device: torch.device, num_workers: int, chunk_bytes: int, probe: Probe | None = None, packed: bool = False
) -> Backend:
    """The backend of `device`, for a reader of `num_workers` threads that reads `chunk_bytes` at a time.

    What it copies and converts, `probe` is told. `packed`: blocks of packed weights come, and are decoded there.
    """
    if device.type == "cpu":
        return CpuBackend(chunk_bytes, probe)
    runtime = RUNTIMES.get(device.type, TorchRuntime)
    return AcceleratorBackend(runtime(device), num_workers, chunk_bytes, probe, packed)


def packing_of(device: torch.device) -> Packing:
    """How slabs for `device` are packed; known before anything is allocated there."""
    return CpuBackend.packing if device.type == "cpu" else AcceleratorBackend.packing


def decoding_bytes(device: torch.device, num_workers: int, chunk_bytes: int) -> int:
    """Bytes of the memory that computes for packed weights on their way: where they arrive, and to decode them."""
    if device.type == "cpu":
        return num_workers * HOST_SCRATCH_BYTES
    return chunk_bytes + PAGE_BYTES + DECODE_SCRATCH_BYTES


def staging_bytes(device: torch.device, num_workers: int, chunk_bytes: int) -> int:
    """Host bytes that the staging buffers of `num_workers` reader threads take, once reads go through them."""
    # On an accelerator one more: what is cast on its way into hosted weights passes through it.
    buffers = 1 if device.type == "cpu" else BUFFERS_PER_WORKER + 1
    return num_workers * buffers * (chunk_bytes + PAGE_BYTES)
