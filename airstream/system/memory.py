"""This says how much memory there is to use: of the host, of this process's control group, of a device.

It knows what the system and drivers count. It refuses to know which share may be used, and what for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch

from airstream.reporting.units import MIB

LIBRARY_BYTES: Mapping[str, int] = {"cuda": 512 * MIB}
"""Host memory that the libraries of a type of accelerator take after the first product, as they load more kernels.

Seen on an H200 with torch 2.11 and CUDA 13: a process that had run one product took 522 MiB more while it generated.
"""

NOISE_BYTES = 16 * MIB
"""Of which the resident memory of a process may rise on its own meanwhile."""

CGROUP_ROOT = Path("/sys/fs/cgroup")


def default_device() -> torch.device:
    """The accelerator if there is one that can be streamed to, else the CPU.

    Apple's MPS has no streams in torch, and shares its memory with the host anyway: there, the CPU is the better one.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def is_present(device: torch.device) -> bool:
    """Whether this torch can use the accelerator `device`."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (
        accelerator is not None and accelerator.type == device.type and device.index < torch.accelerator.device_count()
    )


def describe_devices() -> str:
    """The devices that this torch can use, for people."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return 'only the CPU (device="cpu")'
    return f"the CPU and {torch.accelerator.device_count()} x {accelerator.type}"


def available_host_bytes() -> int:
    """Host memory that could be used now without swapping, within every limit of this process's control groups."""
    return min([psutil.virtual_memory().available, *_cgroup_room()])


def available_device_bytes(device: torch.device) -> int:
    """Free memory of an accelerator, in bytes."""
    free, _ = torch.accelerator.get_memory_info(device)
    return int(free)


def driver_bytes(device: torch.device) -> int:
    """Host memory that using the accelerator `device` takes, above what this process has now.

    What bringing it up and a first small product add is measured, here and now; what its libraries add later is
    assumed, by `LIBRARY_BYTES`. Blocks, for seconds if the device has not been used before.
    """
    if device.type not in LIBRARY_BYTES:
        return 0
    before = process_bytes()
    ones = torch.ones((64, 64), dtype=torch.bfloat16, device=device)
    (ones @ ones).sum().item()
    rise = process_bytes() - before
    return LIBRARY_BYTES[device.type] + (rise if rise > NOISE_BYTES else 0)


class PeakMemory:
    """The peak of this process's resident memory from now on, above what it is now, in bytes; or above `start`.

    Linux can forget an earlier peak; elsewhere the peak since the start of the process stands in, which is no lower.
    """

    def __init__(self, start: int | None = None) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._start = process_bytes() if start is None else start

    def rise(self) -> int:
        """Bytes by which the peak lies above the start; 0 if it does not."""
        return max(0, self._peak() - self._start)

    @staticmethod
    def _peak() -> int:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
        info = psutil.Process().memory_info()
        if sys.platform == "win32":
            return int(info.peak_wset)
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def process_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def _cgroup_room(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each limit above this process leaves. Page cache counts as free: the kernel gives it up for memory."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _rooms_upwards(root, path, "memory.max", "memory.current", ("active_file", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("total_active_file", "total_inactive_file")
            yield from _rooms_upwards(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", names)


def _rooms_upwards(
    root: Path, path: str, limit_name: str, usage_name: str, cache_names: tuple[str, ...]
) -> Iterator[int]:
    parts = Path(path.lstrip("/")).parts
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:depth])
        try:
            limit = (folder / limit_name).read_text().strip()
            if limit != "max":
                cached = sum(_memory_stat(folder).get(name, 0) for name in cache_names)
                yield max(0, int(limit) - int((folder / usage_name).read_text()) + cached)
        except (OSError, ValueError):
            continue  # no limit at this level: the root of the hierarchy, or a container that hides it


def _memory_stat(folder: Path) -> dict[str, int]:
    try:
        pairs = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except OSError:  # not readable here: count all of the page cache as used
        return {}
    return {name: int(value) for name, value in pairs}
