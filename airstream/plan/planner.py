"""The planner makes the plan, by arithmetic: a pure function of the model's sizes, the budgets and the request.

First the frames: the longest context that the budgets hold, and all ways to move layers that leave room for it. In
each, what is left of the budgets is filled with resident tensors, spread evenly over the layers. The one that moves
least wins.

It knows tiers with budgets, groups of tensors with sizes, and frames. It refuses to know devices and modules, how
groups were formed (`groups`), and in which order they become resident (`spread`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

from airstream.errors import BudgetError
from airstream.layout.ring import ring_bytes
from airstream.plan.facts import BatchFacts, ModelFacts
from airstream.plan.placing import Placing, Placings
from airstream.plan.plan import Batch, Plan, Tier
from airstream.plan.policy import AHEAD_BYTES, CONTEXTS, MAX_AHEAD, MIN_OVERLAPPED_CONTEXT, WORTH_A_STEP
from airstream.plan.refusal import most
from airstream.plan.request import HOST, Request
from airstream.plan.text import too_small
from airstream.plan.tiers import Weights, tiers_of
from airstream.plan.traffic import with_prediction

_cached_ring_bytes = lru_cache(maxsize=4096)(ring_bytes)


@dataclass(frozen=True, slots=True)
class _Frame:
    """What is decided first. `prefetch` None: as many batches ahead as make up `AHEAD_BYTES`.

    `is_overlapped`: it is among those that read ahead, with a context worth having. `steps_down`: how far its batches,
    and how many of them are read ahead, are from what is best.
    """

    layers: int
    prefetch: int | None
    head_resident: bool
    context: int
    is_overlapped: bool
    steps_down: int


class _Sizes(NamedTuple):
    """How many batches are read ahead, which tables stay, and what takes the memories."""

    depth: int
    tables: Mapping[str, int]
    weights: Weights
    tiers: Mapping[str, Tier]


def make_plan(facts: ModelFacts, request: Request) -> Plan:
    """The best plan that fits the budgets.

    Preferred, in this order: reading ahead, a longer context, less to read and to stream in a pass; of plans that
    hardly differ in that, a resident lm_head, larger batches, more batches ahead. On a CPU, where weights may stay
    packed and it is known what the machine can do, the seconds of a pass take the place of the bytes.

    Raises:
        BudgetError: not even the smallest plan fits; the message has the smallest budgets that would do.
    """
    for _, frames in itertools.groupby(_frames(facts, request), key=lambda frame: (frame.is_overlapped, frame.context)):
        fitting = [frame for frame in frames if _fits(_bare_plan(facts, request, frame).tiers)]
        plans = [(_fill(facts, request, frame), frame.steps_down) for frame in fitting]
        if plans:
            best, _ = min(plans, key=lambda each: _cost(facts, request, *each))
            return with_prediction(best, facts, request)
    raise BudgetError(too_small(smallest_plan(facts, request), request.described, _shorter(facts, request)))


def plan_or_none(facts: ModelFacts, request: Request) -> Plan | None:
    """The best plan that fits the budgets, for who wants no message where there is none."""
    try:
        return make_plan(facts, request)
    except BudgetError:
        return None


def cost(plan: Plan, steps_down: int = 0) -> tuple[float, ...]:
    """What a pass by `plan` moves, from disk and over the bus, and makes dense, and what that loses. Less is better.

    Every step down, to smaller batches or to fewer of them ahead, has to save `WORTH_A_STEP` to be worth it. What a
    step costs is the same for all contexts and budgets, so that more memory, or less to do in it, is never worse.
    """
    loss = WORTH_A_STEP**steps_down
    looked_up = sum(plan.rows_from_disk.values()) if plan.made_bytes else 0  # which may stay in the place of dense ones
    return plan.read_bytes * loss, plan.streamed_bytes * loss, looked_up, plan.made_bytes * loss


def _cost(facts: ModelFacts, request: Request, plan: Plan, steps_down: int) -> tuple[float, ...]:
    """`cost`, on a CPU behind the seconds of a pass where weights may stay packed: to make them takes its time, too.

    An accelerator makes them at the rate of its memory: whatever moves takes longer.
    """
    if request.tier != HOST or request.hardware is None or not facts.may_stay_packed:
        return cost(plan, steps_down)
    expected = with_prediction(plan, facts, request).prediction
    assert expected is not None
    return expected.decode_seconds * WORTH_A_STEP**steps_down, *cost(plan, steps_down)


def _shorter(facts: ModelFacts, request: Request) -> int:
    """The longest context below the one that was asked for that would fit; 0 if none would, or none was asked for."""

    def holds(context: int) -> bool:
        shorter = replace(request, max_context=context)
        return any(_fits(_bare_plan(facts, shorter, frame).tiers) for frame in _frames(facts, shorter))

    return most(holds, (request.max_context or 1) - 1) if request.workload is None else 0


def smallest_plan(facts: ModelFacts, request: Request) -> Plan:
    """The plan with the lowest peak, whether it fits or not."""
    plans = (_bare_plan(facts, request, frame) for frame in _frames(facts, request))
    return min(plans, key=lambda plan: sum(plan.peak_bytes.values()))


def smallest_whole_plan(facts: ModelFacts, request: Request) -> Plan:
    """The plan that needs the least memory of the device that computes, of those that keep all weights in it."""
    plans = []
    for frame in _frames(facts, request):
        if frame.head_resident and frame.is_overlapped:  # no other is looked at where it fits
            placings = _placings(facts, request, frame)
            every = len(placings.order) + bool(facts.tables)
            plans += [_plan(facts, request, frame, each) for each in (placings.dense(every), placings.packed(0, every))]
    return min(plans, key=lambda plan: plan.tiers[request.tier].peak_bytes)


def _bare_plan(facts: ModelFacts, request: Request, frame: _Frame) -> Plan:
    """The plan of `frame` with nothing resident but what it says."""
    return _plan(facts, request, frame, _placings(facts, request, frame).dense(0))


def _frames(facts: ModelFacts, request: Request) -> Iterator[_Frame]:
    """Every frame worth considering, best first."""
    depths = _depths(request)
    longest = facts.footprint.max_position
    contexts = [min(longest, tokens) for tokens in CONTEXTS] if request.max_context is None else [request.max_context]
    overlapped = [context for context in contexts if context >= MIN_OVERLAPPED_CONTEXT] or contexts
    heads = (True, False) if facts.head is not None else (True,)
    ahead = [depth for depth in depths if depth != 0]
    for is_overlapped, allowed_contexts, allowed_depths in ((True, overlapped, ahead), (False, contexts, depths)):
        for context in dict.fromkeys(allowed_contexts):
            for head_resident in heads:
                for smaller, layers in enumerate(facts.batchings):
                    for fewer, depth in enumerate(allowed_depths):
                        yield _Frame(layers, depth, head_resident, context, is_overlapped, smaller + fewer)


def _depths(request: Request) -> tuple[int | None, ...]:
    """The numbers of batches to read ahead that may be chosen, best first."""
    return (None, 1, 0) if request.prefetch_batches is None else (request.prefetch_batches,)


def _fill(facts: ModelFacts, request: Request, frame: _Frame) -> Plan:
    """The plan of `frame` with as much resident as fits: dense, or packed, if less moves then."""
    placings = _placings(facts, request, frame)

    def fits(placing: Placing, without_ring: bool = False) -> bool:
        return _fits(_sizes(facts, request, frame, placing).tiers, without_ring)

    def most_of(place: Callable[[int], Placing], limit: int) -> int:
        # The ring shrinks where all of its batches have given something, so that more may fit where less does not.
        count = most(lambda count: fits(place(count), without_ring=True), limit)
        while count and not fits(place(count)):
            count -= 1
        return count

    def with_packed(least: int) -> Placing:
        """At least so many groups are dense, then as many as can be stay packed, then as many of those are dense."""
        kept = most_of(partial(placings.packed, least), every + bool(facts.tables))
        return placings.packed(most(lambda count: fits(placings.packed(count, kept)), min(kept, every)), kept)

    every = len(placings.order)
    dense = most_of(placings.dense, every + bool(facts.tables))
    chosen = [placings.dense(dense)]
    if dense < every and placings.has_packed:
        chosen += [with_packed(least) for least in dict.fromkeys((0, dense // 2 if request.tier == HOST else 0))]
    if request.tier != HOST:
        chosen = [_most_hosted(placings, each, fits) for each in chosen]
    plans = (_plan(facts, request, frame, placing) for placing in chosen)
    return min(plans, key=lambda plan: _cost(facts, request, plan, frame.steps_down))


def _most_hosted(placings: Placings, chosen: Placing, fits: Callable[[Placing], bool]) -> Placing:
    """`chosen` with as much in host memory as fits."""
    every = len(placings.order) + 1  # the lm_head, too
    return placings.hosted(chosen, most(lambda count: fits(placings.hosted(chosen, count)), every))


def _placings(facts: ModelFacts, request: Request, frame: _Frame) -> Placings:
    layers = facts.batchings[frame.layers]
    return Placings(layers, facts.head, is_head_resident=frame.head_resident, is_on_device=request.tier != HOST)


def _head(facts: ModelFacts, frame: _Frame) -> str:
    """Where the lm_head is, in a word."""
    if facts.head is None:
        return "resident" if facts.has_fixed_head else "none"
    return "resident" if frame.head_resident else "streamed"


def _batches(facts: ModelFacts, frame: _Frame) -> tuple[BatchFacts, ...]:
    return facts.batchings[frame.layers] + ((facts.head,) if facts.head is not None else ())


def _sizes(facts: ModelFacts, request: Request, frame: _Frame, placing: Placing) -> _Sizes:
    """What decides whether a plan fits, without the names of what lies where."""
    tables = {name: group.nbytes for name, group in facts.tables.items() if name not in facts.tables_of_head}
    tables = tables if placing.with_tables else {}
    resident = facts.resident_bytes + sum(tables.values())
    hosted, streamed, slabs = 0, [], []
    counts = zip(placing.resident, placing.packed, placing.hosted, strict=True)
    for batch, (dense, packed, waiting) in zip(_batches(facts, frame), counts, strict=True):
        kept = dense + packed
        resident += batch.resident_bytes(dense) + batch.packed_bytes(dense, kept)
        hosted += batch.host_bytes(kept, kept + waiting)
        streamed.append(batch.slab_bytes[kept])
        slabs.append(streamed[-1] + batch.made_bytes(dense, kept))
    depth = frame.prefetch if frame.prefetch is not None else enough_ahead(streamed)
    ring = _cached_ring_bytes(tuple(filter(None, slabs)), depth + 1)
    weights = Weights(ring, resident, placing.rounding_bytes, hosted)
    return _Sizes(depth, tables, weights, tiers_of(facts, request, frame.context, weights))


def _plan(facts: ModelFacts, request: Request, frame: _Frame, placing: Placing) -> Plan:
    """The plan in which everything has been decided; it may not fit."""
    sizes = _sizes(facts, request, frame, placing)
    in_memory = sizes.tables.keys() | (facts.tables_of_head if frame.head_resident else frozenset())
    return Plan(
        model=facts.name,
        dtype=facts.dtype,
        kernels=facts.kernels,
        device=request.device,
        computes_on=request.tier,
        batches=tuple(map(_place, _batches(facts, frame), placing.resident, placing.packed, placing.hosted)),
        layers_per_batch=frame.layers,
        prefetch_batches=sizes.depth,
        ring_bytes=sizes.weights.ring,
        head=_head(facts, frame),
        tables=sizes.tables,
        rows_from_disk={name: group.nbytes for name, group in facts.tables.items() if name not in in_memory},
        checkpoint_bytes=facts.checkpoint_bytes,
        direct_io=request.direct_io,
        max_context=frame.context,
        max_batch_size=request.max_batch_size,
        tiers=sizes.tiers,
    )


def _place(batch: BatchFacts, resident: int, packed: int, hosted: int) -> Batch:
    kept = resident + packed
    made = batch.made_bytes(resident, kept)
    return Batch(
        units=batch.units,
        nbytes=batch.slab_bytes[kept] + made,
        read_bytes=batch.read_bytes[kept + hosted],
        resident=batch.names(0, resident),
        resident_bytes=batch.resident_bytes(resident),
        hosted=batch.names(kept, kept + hosted),
        hosted_bytes=batch.host_bytes(kept, kept + hosted),
        packed=batch.names(resident, kept),
        packed_bytes=batch.packed_bytes(resident, kept),
        made_bytes=made,
    )


def enough_ahead(sizes: Sequence[int]) -> int:
    """How many batches to read ahead so that the disk never waits for room."""
    sizes = [nbytes for nbytes in sizes if nbytes]
    if not sizes:
        return 1
    average = max(sum(sizes) // len(sizes), 1)
    return min(-(-AHEAD_BYTES // average), MAX_AHEAD, max(len(sizes) - 1, 1))


def _fits(tiers: Mapping[str, Tier], without_ring: bool = False) -> bool:
    return all(
        tier.peak_bytes - (tier.items.get("ring", 0) if without_ring else 0) <= tier.budget_bytes
        for tier in tiers.values()
    )
