"""Costs are what passes took, in seconds and bytes. They are sums of numbers; nothing here measures anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from airstream.reporting.probe import LINKS


@dataclass(slots=True)
class LinkUse:
    """One link: the wall seconds in which at least one transfer was under way, and the bytes that went through."""

    seconds: float = 0.0
    nbytes: int = 0

    @property
    def bytes_per_second(self) -> float:
        """The rate while the link was busy; 0 if it never was."""
        return self.nbytes / self.seconds if self.seconds else 0.0


def _no_use() -> dict[str, LinkUse]:
    return {link: LinkUse() for link in LINKS}


@dataclass(slots=True)
class Costs:
    """The costs of one pass, or of several together.

    Where the computing thread, or the device's compute stream, spent the time: `compute_seconds`, `stall_seconds` and
    `python_seconds` are disjoint and add up to `wall_seconds`.

    Attributes:
        passes, tokens: walks over all layers; tokens per sequence that went in.
        wall_seconds: from the beginning of each pass to that of the next, or to the end of the call.
        compute_seconds: inside forward passes, less `stall_seconds`. Conversions that the device itself does are in it.
        stall_seconds: computation waited for weights, `stalls` by what it waited for: a link, "embedding rows",
            or "scheduling" where nothing was under way.
        python_seconds: outside forward passes: sampling, and Python.
        links: reads, conversions and copies, which run at the same time as computation.
        io_seconds: at least one link was busy on behalf of the passes.
        read_bytes, host_bytes: bytes of weights, from disk and host memory, that the passes used. What is read ahead
            counts in the pass that uses it.
        row_bytes: bytes of embedding rows, from disk.
    """

    passes: int = 0
    tokens: int = 0
    wall_seconds: float = 0.0
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0
    python_seconds: float = 0.0
    io_seconds: float = 0.0
    read_bytes: int = 0
    host_bytes: int = 0
    row_bytes: int = 0
    stalls: dict[str, float] = field(default_factory=dict)
    links: dict[str, LinkUse] = field(default_factory=_no_use)

    @property
    def hidden(self) -> float:
        """The share of `io_seconds` in which computation did not wait: how well the two overlap. 1 without any."""
        if not self.io_seconds:
            return 1.0
        waited = self.stall_seconds - self.stalls.get(SCHEDULING, 0.0)
        return min(1.0, max(0.0, 1.0 - waited / self.io_seconds))

    def add(self, other: Costs) -> None:
        """Count `other` in."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        add_causes(self.stalls, other.stalls)
        for link, use in other.links.items():
            self.links[link].seconds += use.seconds
            self.links[link].nbytes += use.nbytes

    def to_dict(self) -> dict[str, Any]:
        """The costs as plain values, for JSON."""
        return asdict(self) | {"hidden": self.hidden}


COMPUTE, STALL, PYTHON = "compute", "stall", "Python"
"""Kinds of spans besides links; tracks too, beside those of the reader threads and of the copy stream.

Computation and its stalls share a track.
"""

ROWS, SCHEDULING = "embedding rows", "scheduling"
"""What computation waits for, besides links."""

_SUMS = (
    "passes", "tokens", "wall_seconds", "compute_seconds", "stall_seconds", "python_seconds", "io_seconds",
    "read_bytes", "host_bytes", "row_bytes",
)  # fmt: skip


def add_causes(causes: dict[str, float], more: Mapping[str, float]) -> None:
    """Add `more` seconds to `causes`."""
    for cause, seconds in more.items():
        causes[cause] = causes.get(cause, 0.0) + seconds
