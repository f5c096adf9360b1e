"""This computes with stretches of time: how long at least one of several took, and which to blame for a wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Interval = tuple[float, float]


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint stretches, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def total(merged: Iterable[Interval]) -> float:
    """Seconds that disjoint stretches take."""
    return sum(end - start for start, end in merged)


def within(merged: Iterable[Interval], start: float, end: float) -> list[Interval]:
    """What of disjoint stretches lies between `start` and `end`."""
    return [(max(a, start), min(b, end)) for a, b in merged if a < end and b > start]


def blame(start: float, end: float, busy: Mapping[str, Sequence[Interval]], otherwise: str) -> dict[str, float]:
    """The seconds from `start` to `end` by cause: the link that was busy; of several at once, the one busy for longest.

    In a pipeline the slowest link is busy all the time, and the others wait for it. What passes while no link is busy
    is put down to `otherwise`.

    Args:
        busy: disjoint stretches in which each link was busy.
    """
    shares = {link: within(stretches, start, end) for link, stretches in busy.items()}
    causes: dict[str, float] = {}
    covered: list[Interval] = []
    explained = 0.0
    for link in sorted(shares, key=lambda link: -total(shares[link])):
        covered = merge([*covered, *shares[link]])
        seconds, explained = total(covered) - explained, total(covered)
        if seconds > 0:
            causes[link] = seconds
    if end - start > explained:
        causes[otherwise] = end - start - explained
    return causes
