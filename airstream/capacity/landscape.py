"""A landscape has seconds per token over sizes of memory, for one model and the rates of one machine, by many plans.

It knows plans. It refuses to know pictures (`map` draws this), and whether such a machine exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from airstream.plan.facts import ModelFacts
from airstream.plan.plan import Plan
from airstream.plan.planner import make_plan, plan_or_none, smallest_plan
from airstream.plan.policy import AUTO_SHARE
from airstream.plan.request import HOST, Request

__all__ = ["Landscape", "Spot", "survey"]

BEYOND = 1.2
"""The largest memory that is looked at, in terms of what holds everything."""

SPAN, MARGIN = 40, 0.06
"""The smallest one is the least that does, but not below this part of the largest; and a little less, so that the edge
can be seen: by this share of the width of a picture."""

SIZES_OF_MAP, SIZES_OF_CURVE = 32, 64
"""Sizes of each memory: where there are two memories, and where there is one."""

ROOMY = 1 << 50
"""Bytes that hold any model."""


@dataclass(frozen=True, slots=True)
class Spot:
    """What a plan gives with one size of each memory: seconds per token, and weights read from disk for each."""

    seconds: float
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Landscape:
    """Sizes of memory, in bytes, and what they give.

    Attributes:
        shares: of device memory, if there is any, and of host memory: what a plan may take of it. All of it where the
            budget was given, else 90 %.
        context: tokens that are planned for.
        device_bytes: sizes of the accelerator's memory, rising; empty where the CPU computes.
        host_bytes: sizes of host memory, rising.
        spots: by device size, or one for the CPU, and then by host size; None where the model does not fit.
        here_bytes: what the machine that was asked for has: of device memory, if there is any, and of host memory.
        here: what that gives.
        is_cached: that reads from the page cache, and is faster than all the others, which read from disk.
    """

    shares: tuple[float, ...]
    context: int
    device_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]
    spots: tuple[tuple[Spot | None, ...], ...]
    here_bytes: tuple[int, ...]
    here: Spot | None
    is_cached: bool

    def ram_without_disk(self) -> list[float | None]:
        """By device size, the host memory from which on nothing comes from disk any more; None if that is never."""
        return [_enough(self.host_bytes, spots, self.shares[-1]) for spots in self.spots]


def survey(facts: ModelFacts, request: Request, on_progress: Callable[[float], None] = lambda _: None) -> Landscape:
    """Plans for `request` with memories of many sizes, whatever its own budgets are.

    All of them are for one context: that of the plan for `request`, so that the picture and the plan say the same; if
    the machine asked for cannot hold the model, the longest that is planned for. What is read comes from disk, around
    the page cache. `on_progress` is told which share of it is done.
    """
    whole = make_plan(facts, replace(request, budgets=dict.fromkeys(request.budgets, ROOMY), hardware=None))
    asked = plan_or_none(facts, request)
    request = replace(request, max_context=(asked or whole).max_context, direct_io=True)
    whole = make_plan(facts, replace(request, budgets=dict.fromkeys(request.budgets, ROOMY), hardware=None))
    least, most = smallest_plan(facts, request).peak_bytes, whole.peak_bytes
    shares = {tier: _share_of(request, tier) for tier in dict.fromkeys((request.tier, HOST))}
    device_bytes: tuple[int, ...] = ()
    host_bytes = _sizes(least[HOST] / shares[HOST], most[HOST] / shares[HOST], SIZES_OF_CURVE)
    if request.tier != HOST:
        share = shares[request.tier]
        device_bytes = _sizes(least[request.tier] / share, most[request.tier] / share, SIZES_OF_MAP)
        all_of_it = (most[HOST] + facts.checkpoint_bytes) / shares[HOST]
        host_bytes = _sizes(least[HOST] / shares[HOST], all_of_it, SIZES_OF_MAP)
    memories: Sequence[Mapping[str, int]] = [{request.tier: size} for size in device_bytes] or [{}]
    here = {tier: int(request.budgets[tier] / share) for tier, share in shares.items()}
    spots = []
    for done, memory in enumerate(memories):
        row = []
        for number, spot in enumerate(_spots(facts, request, memory, host_bytes)):
            row.append(spot)
            on_progress((done + (number + 1) / len(host_bytes)) / len(memories))
        spots.append(tuple(row))
    return Landscape(
        shares=tuple(shares.values()),
        context=whole.max_context,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        spots=tuple(spots),
        here_bytes=tuple(here.values()),
        here=None if asked is None else _of_plan(asked),
        is_cached=asked is not None and not asked.direct_io and asked.read_bytes > 0,
    )


def _share_of(request: Request, tier: str) -> float:
    """What a plan may take of a memory: sizes of one whose budget was given are budgets themselves."""
    return 1.0 if tier in request.given else AUTO_SHARE


def _sizes(least: float, most: float, count: int) -> tuple[int, ...]:
    """Sizes of memory around `least` and `most`, evenly spread over their logarithms."""
    largest = BEYOND * most
    span = min((BEYOND * most / least) ** (1 + MARGIN), SPAN)
    return tuple(int(largest * span ** (number / (count - 1) - 1)) for number in range(count))


def _spots(
    facts: ModelFacts, request: Request, memory: Mapping[str, int], host_bytes: Sequence[int]
) -> Iterator[Spot | None]:
    """One for each of `host_bytes`. Once nothing comes from disk, more host memory changes nothing."""
    last: Spot | None = None
    for size in host_bytes:
        if last is None or last.disk_bytes:
            last = _spot(facts, request, {**memory, HOST: size})
        yield last


def _spot(facts: ModelFacts, request: Request, memory: Mapping[str, int]) -> Spot | None:
    budgets = {name: int(_share_of(request, name) * nbytes) for name, nbytes in memory.items()}
    plan = plan_or_none(facts, replace(request, budgets=budgets))
    return None if plan is None else _of_plan(plan)


def _of_plan(plan: Plan) -> Spot:
    assert plan.prediction is not None  # the request says what the machine can do
    return Spot(plan.prediction.decode_seconds, plan.read_bytes)


def _enough(host_bytes: Sequence[int], spots: Sequence[Spot | None], share: float) -> float | None:
    """Every byte that is still read from disk needs one of host memory's budget, if none of that was left over."""
    enough = None
    for size, spot in zip(host_bytes, spots, strict=True):
        if spot is not None and spot.disk_bytes:
            enough = size + spot.disk_bytes / share
        elif spot is not None:
            return min(enough or math.inf, size)
    return enough
