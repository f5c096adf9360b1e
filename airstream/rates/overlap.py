"""This measures what a disk and a processor leave of each other's rates when both are at work.

Reads take memory bandwidth and some processor time, and a processor that computes without a pause answers a disk late.
It knows both measurements. It refuses to know what is read, and for what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from airstream.rates.disk import files_to_read, read_files
from airstream.rates.effort import Effort, seconds_per_call

__all__ = ["Shares", "measure_shares"]


@dataclass(frozen=True, slots=True)
class Shares:
    """What is left of a rate: 1 if all of it is.

    Attributes:
        disk: of reading, while the processor computes.
        computing: of that, while the disk is read.
    """

    disk: float = 1.0
    computing: float = 1.0


def measure_shares(folder: Path, effort: Effort, compute: Callable[[], object]) -> Shares:
    """Call `compute`, read what `folder` holds, and do both at once. Blocks meanwhile.

    Raises:
        ArgumentError, DiskSpaceError, ReadError: as `measure_disk`.
    """
    effort = replace(effort, disk_bytes=effort.disk_bytes // 2, disk_seconds=effort.disk_seconds / 2)
    alone = 1 / seconds_per_call(compute, lambda: None, effort.seconds)
    with files_to_read(folder, effort) as files:  # one behind the other: disks slow down and recover by themselves
        quiet, both = read_files(files, effort), read_files(files, effort, compute)
    return Shares(min(1.0, both.bytes_per_second / quiet.bytes_per_second), min(1.0, both.calls_per_second / alone))
