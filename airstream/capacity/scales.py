"""This has round numbers for the logarithmic axes of pictures: steps of ten in seconds, of two in sizes of memory.

It knows matplotlib's axes. It refuses to know what is drawn between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from airstream.reporting.units import GIB, MIB

__all__ = ["levels_between", "set_seconds", "set_sizes", "size_text"]

STEPS = (1, 1.5, 2, 3, 5, 7)
"""Seconds that have a line, times powers of ten."""

FINE_STEPS = (1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9)
"""Where fewer than `MIN_TICKS` of those are on an axis."""

MIN_TICKS = 4


def set_sizes(axes: Any, which: str, sizes: Sequence[int], label: str) -> None:
    """Sizes of memory, in bytes, on the axis `which`, from the first to the last of `sizes`."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axes.set(**{f"{which}scale": "log", f"{which}lim": (sizes[0], sizes[-1])})
    unit, name = _unit(sizes[-1])
    ticks = _ticks(sizes[0] / unit, sizes[-1] / unit)
    axis.set_ticks([tick * unit for tick in ticks], [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
    axis.set_label_text(label.format(unit=name))


def set_seconds(axes: Any, seconds: Sequence[float]) -> None:
    """Seconds on the vertical axis, from the least to the most, and a little more."""
    low, high = min(seconds) / 1.2, max(seconds) * 1.2
    levels = list(levels_between(low, high))
    if len(levels) < MIN_TICKS:
        levels = list(levels_between(low, high, FINE_STEPS))
    axes.set(yscale="log", ylim=(low, high), ylabel="predicted seconds per token")
    axes.set_yticks(levels, [f"{level:g}" for level in levels])
    axes.set_yticks([], minor=True)


def levels_between(low: float, high: float, steps: Sequence[float] = STEPS) -> Iterator[float]:
    """Round numbers between two."""
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        yield from (level for step in steps if low < (level := step * 10.0**power) < high)


def size_text(nbytes: float) -> str:
    """A size in three digits at most: `"64 GiB"`."""
    unit, name = _unit(nbytes)
    return f"{nbytes / unit:.3g} {name}"


def _ticks(low: float, high: float) -> list[float]:
    """Powers of two between two numbers, and as many between these as it takes to have a few."""
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    for parts in (2, 4, 8, 16, 32):
        ticks = [2.0**power * (1 + part / parts) for power in powers for part in range(parts)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= MIN_TICKS:
            break
    return ticks


def _unit(nbytes: float) -> tuple[int, str]:
    return (GIB, "GiB") if nbytes >= GIB else (MIB, "MiB")
