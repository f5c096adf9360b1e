"""This measures what this machine can do, in a few seconds. It puts single measurements together; it stores nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from airstream.errors import ArgumentError
from airstream.rates.arithmetic import measure_flops, measure_layer, measure_weights, products
from airstream.rates.disk import measure_disk
from airstream.rates.effort import Effort
from airstream.rates.facts import HardwareFacts, Rate, measured_today
from airstream.rates.identity import OtherLoad, machine_name, usable_cores
from airstream.rates.links import measure_bus, measure_host_copy
from airstream.rates.overlap import Shares, measure_shares
from airstream.reporting.units import MIB
from airstream.system.memory import available_host_bytes
from airstream.transfer.backends import create_backend
from airstream.transfer.base import Backend
from airstream.transfer.reader import CHUNK_BYTES, NUM_WORKERS
from airstream.transfer.shortage import ShortageError

__all__ = ["measure"]

ACCELERATOR_TOKENS = 2048
"""Tokens in a matrix product that keep a large accelerator busy."""

LEAST_DEVICE_BYTES = 128 * MIB
"""With less, a device's caches would hold the weights."""

REFUSED = "through the page cache, direct reads refused"
"""Said of a disk's rate that may be that of memory."""

NOISE_CORES = 0.3
"""Cores that others use without anybody noticing."""

Progress = Callable[[str], None]


def _silent(_: str) -> None:
    pass


def measure(
    folder: str | os.PathLike[str], device: torch.device, progress: Progress = _silent, effort: Effort | None = None
) -> HardwareFacts:
    """Measure the disk of `folder`, host memory, and `device`. Blocks for a few seconds; best when nothing else runs.

    A checkpoint in `folder` is read, never written beside. Where there is none, or a small one, a test file of 512 MiB
    is written on the same file system and deleted, whatever happens.

    Peak bytes: 512 MiB of host memory, and as much on an accelerator; less where little is free.

    Args:
        progress: is called with what is about to be measured.
        effort: sizes and times; None for what suits the device.

    Raises:
        ArgumentError: `folder` is no folder, or there is nowhere to write a test file.
        DiskSpaceError: there is no room for the test file.
        ReadError: the disk failed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ArgumentError(f"{path} is not a folder: name one on the disk that is to be measured")
    effort = (effort or _effort_for(device)).within(available_host_bytes())
    others = OtherLoad()
    progress("the disk")
    disk = measure_disk(path, effort)
    progress("memory")
    host_copy = measure_host_copy(effort)
    progress(f"arithmetic on {device}")
    weights, flops, layer_seconds = _arithmetic(device, effort)
    shares = Shares() if device.type != "cpu" else _shares(path, effort, progress)
    links = {} if device.type == "cpu" else _links(device, effort, progress)
    source = _source(others.cores())
    return HardwareFacts(
        machine=machine_name(device),
        num_cores=usable_cores(),
        disk=Rate(
            disk.bytes_per_second,
            source if disk.direct else f"{source}; {REFUSED}",
        ),
        disk_cpu_seconds_per_byte=disk.cpu_seconds_per_byte,
        host_copy=Rate(host_copy, source),
        weights=_rates(weights, source),
        flops=_rates(flops, source),
        layer_seconds=layer_seconds,
        disk_share_while_computing=shares.disk,
        computing_share_while_reading=shares.computing,
        **_rates(links, source),
    )


def _shares(folder: Path, effort: Effort, progress: Progress) -> Shares:
    progress("the disk and the processor at once")
    return measure_shares(folder, effort, products(effort.ring_bytes, effort))


def _effort_for(device: torch.device) -> Effort:
    return Effort() if device.type == "cpu" else Effort(max_tokens=ACCELERATOR_TOKENS)


def _source(other_cores: float) -> str:
    """The date; and the load if it was high enough to make the rates of an idle machine look low."""
    busy = f"; while other programs used {other_cores:.1f} cores" if other_cores >= NOISE_CORES else ""
    return f"{measured_today()}{busy}"


def _rates(by_dtype: Mapping[str, float], source: str) -> dict[str, Rate]:
    return {dtype: Rate(per_second, source) for dtype, per_second in by_dtype.items()}


def _links(device: torch.device, effort: Effort, progress: Progress) -> dict[str, float]:
    """Bytes per second. Where memory cannot be pinned, "h2d" and "d2h" are as slow as the rest."""
    progress(f"the link to {device}")
    pinned = measure_bus(device, pin=True, effort=effort)
    pageable = measure_bus(device, pin=False, effort=effort)
    return {"h2d": pinned.h2d, "h2d_pageable": pageable.h2d, "d2h": pinned.d2h, "d2h_pageable": pageable.d2h}


def _arithmetic(device: torch.device, effort: Effort) -> tuple[dict[str, float], dict[str, float], float]:
    """Rates of weights and of matrix products, and seconds per layer."""
    backend = create_backend(device, NUM_WORKERS, CHUNK_BYTES)
    try:
        memory = _allocate(backend, effort.weights_bytes)
        backend.synchronize()
        weights = measure_weights(backend, memory, effort)
        flops = measure_flops(backend, memory, effort)
        del memory
        return weights, flops, measure_layer(backend, effort)
    finally:
        backend.synchronize()
        backend.close()


def _allocate(backend: Backend, nbytes: int) -> torch.Tensor:
    """`nbytes` on the device, or as much as a device that is nearly full still has."""
    try:
        return backend.allocate(nbytes)
    except ShortageError:
        if nbytes < 2 * LEAST_DEVICE_BYTES:
            raise
    return _allocate(backend, nbytes // 2)
