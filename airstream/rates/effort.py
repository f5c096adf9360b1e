"""This says how much work a measurement is worth, and has the stopwatch. It knows bytes and seconds alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from airstream.reporting.units import GIB, MIB

__all__ = ["Effort", "fastest_call", "seconds_per_call", "timed"]

MIN_SAMPLE_SECONDS = 0.01
"""Shorter calls are timed several at a time: waiting for a device takes some 10 microseconds itself."""

MIN_SAMPLES = 2
"""However long a call takes."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Sizes and times of a measurement. The defaults take a few seconds; tests take less.

    Attributes:
        disk_bytes, disk_seconds: reading ends with whichever comes first.
        file_bytes: the test file, where there is no checkpoint as large as that.
        ring_bytes: host memory that reads land in, over and over.
        copy_bytes: what is copied at a time, from host memory to host memory or to and from a device.
        pinned_bytes: host memory that is pinned for copies to a device.
        weights_bytes: distinct weights that products go through in turn, so that no cache holds them.
        matrix: rows and columns of a weight; every second one lies the other way round.
        max_tokens: the largest number of tokens in a matrix product.
        seconds: for everything that is repeated.
        num_layers, num_tokens: layers of the tiny model, and tokens that it generates.
    """

    disk_bytes: int = 2 * GIB
    disk_seconds: float = 2.0
    file_bytes: int = 512 * MIB
    ring_bytes: int = 256 * MIB
    copy_bytes: int = 256 * MIB
    pinned_bytes: int = 64 * MIB
    weights_bytes: int = 512 * MIB
    matrix: tuple[int, int] = (8192, 3072)
    max_tokens: int = 512
    seconds: float = 0.3
    num_layers: int = 24
    num_tokens: int = 8

    def within(self, available_bytes: int) -> Effort:
        """This effort, with at most a quarter of `available_bytes` in each buffer; 128 MiB it may be in any case."""
        most = max(available_bytes // 4, 128 * MIB) // MIB * MIB
        names = ("ring_bytes", "copy_bytes", "pinned_bytes", "weights_bytes")
        return replace(self, **{name: min(getattr(self, name), most) for name in names})


def timed(work: Callable[[], object], synchronize: Callable[[], None], calls: int = 1) -> float:
    """Wall seconds of `calls` calls of `work`, until the device has done what they queued. Blocks for as long."""
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize()
    return time.perf_counter() - started


def seconds_per_call(work: Callable[[], object], synchronize: Callable[[], None], seconds: float) -> float:
    """The median of `work`'s wall seconds, what it queues on the device included, after a call that warms up.

    Blocks for about `seconds`; longer if a few calls take longer.
    """
    timed(work, synchronize)
    first = timed(work, synchronize)
    calls = max(1, int(min(MIN_SAMPLE_SECONDS, seconds) / max(first, 1e-7)))
    return statistics.median(_samples(work, synchronize, seconds, calls)) / calls


def fastest_call(work: Callable[[], object], synchronize: Callable[[], None], seconds: float) -> float:
    """As `seconds_per_call`, but the least instead of the median: for work that others can only slow down."""
    timed(work, synchronize)
    return min(_samples(work, synchronize, seconds))


def _samples(
    work: Callable[[], object], synchronize: Callable[[], None], seconds: float, calls: int = 1
) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < MIN_SAMPLES or time.perf_counter() < end:
        samples.append(timed(work, synchronize, calls))
    return samples
