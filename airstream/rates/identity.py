"""This says what machine this is: enough to tell its measurements from another one's, nothing that names its owner."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path

import psutil
import torch

from airstream.reporting.units import GIB, counted

__all__ = ["OtherLoad", "machine_name", "usable_cores"]

_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""What psutil calls the times in which a core works for somebody. Not all systems know all of them."""


def machine_name(device: torch.device) -> str:
    """Processor, cores, memory and `device`: the same as long as the machine is. No host name."""
    host = f"{_processor()}, {counted(usable_cores(), 'core')}, {round(psutil.virtual_memory().total / GIB)} GiB"
    return host if device.type == "cpu" else f"{host}, {_device_name(device)}"


def usable_cores() -> int:
    """CPU cores this process may run on. A quota of a control group, which lends shares of cores, does not count."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OtherLoad:
    """How much of the machine everybody else has used since this was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._started = _busy_seconds(), time.process_time(), time.perf_counter()

    def cores(self) -> float:
        """CPU cores that other programs, or other guests of the same host, kept busy on average."""
        seconds = time.perf_counter() - self._started
        others = _busy_seconds() - self._busy - (time.process_time() - self._own)
        return max(0.0, others / seconds)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(float(getattr(times, name, 0.0)) for name in _BUSY)


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _device_name(device: torch.device) -> str:
    """As the driver calls it; as torch does, where there is no driver to ask."""
    with contextlib.suppress(RuntimeError, AssertionError, AttributeError):
        return str(torch.get_device_module(device).get_device_name(device))
    return str(device)
