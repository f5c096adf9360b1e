"""The planner makes the plan, by arithmetic: a pure function of the model's sizes, the budgets and the request.

First the frames: the longest context that the budgets hold, and all ways to move layers that leave room for it. In
each, what is left of the budgets is filled with resident tensors, spread evenly over the layers. The one that moves
least wins.

It knows tiers with budgets, groups of tensors with sizes, and frames. It refuses to know devices and modules, how
groups were formed (`groups`), and in which order they become resident (`spread`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from airstream.errors import BudgetError
from airstream.layout.ring import ring_bytes
from airstream.plan.facts import BatchFacts, ModelFacts
from airstream.plan.plan import Batch, Plan, Tier
from airstream.plan.policy import AHEAD_BYTES, CONTEXTS, MAX_AHEAD, MIN_OVERLAPPED_CONTEXT, WORTH_A_STEP
from airstream.plan.refusal import most
from airstream.plan.request import HOST, Request
from airstream.plan.sharing import roundings
from airstream.plan.spread import counts_after, in_order, resident_order
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


@dataclass(frozen=True, slots=True)
class _Placing:
    """How many groups of each batch stay on the device, and how many of the next ones in host memory.

    Those on the device take `rounding_bytes` besides.
    """

    resident: Sequence[int]
    hosted: Sequence[int]
    with_tables: bool = False
    rounding_bytes: int = 0


class _Sizes(NamedTuple):
    """How many batches are read ahead, which tables stay, and what takes the memories."""

    depth: int
    tables: Mapping[str, int]
    weights: Weights
    tiers: Mapping[str, Tier]


def make_plan(facts: ModelFacts, request: Request) -> Plan:
    """The best plan that fits the budgets.

    Preferred, in this order: reading ahead, a longer context, less to read and to stream in a pass; of plans that
    hardly differ in that, a resident lm_head, larger batches, more batches ahead.

    Raises:
        BudgetError: not even the smallest plan fits; the message has the smallest budgets that would do.
    """
    for _, frames in itertools.groupby(_frames(facts, request), key=lambda frame: (frame.is_overlapped, frame.context)):
        fitting = [frame for frame in frames if _fits(_bare_plan(facts, request, frame).tiers)]
        plans = [(_fill(facts, request, frame), frame.steps_down) for frame in fitting]
        if plans:
            return with_prediction(min(plans, key=lambda each: cost(*each))[0], facts, request)
    raise BudgetError(too_small(smallest_plan(facts, request), request.described, _shorter(facts, request)))


def plan_or_none(facts: ModelFacts, request: Request) -> Plan | None:
    """The best plan that fits the budgets, for who wants no message where there is none."""
    try:
        return make_plan(facts, request)
    except BudgetError:
        return None


def cost(plan: Plan, steps_down: int) -> tuple[float, float]:
    """What a pass moves by `plan`, from disk and over the bus, and what is lost by how it is moved. Less is better.

    Every step down, to smaller batches or to fewer of them ahead, has to save `WORTH_A_STEP` to be worth it. What a
    step costs is the same for all contexts and budgets, so that more memory, or less to do in it, is never worse.
    """
    loss = WORTH_A_STEP**steps_down
    return plan.read_bytes * loss, plan.streamed_bytes * loss


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


def _bare_plan(facts: ModelFacts, request: Request, frame: _Frame) -> Plan:
    """The plan of `frame` with nothing resident but what it says."""
    nothing = [0] * len(_batches(facts, frame))
    rounding = _head_rounding(facts, request, frame)
    return _plan(facts, request, frame, _Placing(_with_head(nothing, facts, frame), nothing, rounding_bytes=rounding))


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
    """The plan of `frame` with as much resident as fits."""
    batches = _batches(facts, frame)
    layers = batches[: len(facts.batchings[frame.layers])]
    order = resident_order(layers)
    nothing = [0] * len(batches)
    taken = roundings(in_order(layers, order)) if request.tier != HOST else [0] * (len(order) + 1)
    taken_by_head = _head_rounding(facts, request, frame)

    def resident(steps: int) -> _Placing:
        counts = counts_after(order, steps, len(layers)) + [0] * (len(batches) - len(layers))
        rounding = taken_by_head + taken[min(steps, len(order))]
        return _Placing(_with_head(counts, facts, frame), nothing, steps > len(order), rounding)

    def fits(placing: _Placing, without_ring: bool = False) -> bool:
        return _fits(_sizes(facts, request, frame, placing).tiers, without_ring)

    # The ring shrinks where all of its batches have given something, so that more may fit where less does not.
    steps = most(lambda steps: fits(resident(steps), without_ring=True), len(order) + bool(facts.tables))
    while steps and not fits(resident(steps)):
        steps -= 1
    chosen = resident(steps)
    if request.tier != HOST:
        rest = [batch for batch in order[min(steps, len(order)) :] if _can_be_hosted(layers[batch])]
        if not frame.head_resident and facts.head is not None and _can_be_hosted(facts.head):
            rest.insert(0, len(layers))

        def hosted(count: int) -> _Placing:
            return replace(chosen, hosted=counts_after(rest, count, len(batches)))

        chosen = hosted(most(lambda count: fits(hosted(count)), len(rest)))
    return _plan(facts, request, frame, chosen)


def _can_be_hosted(batch: BatchFacts) -> bool:
    return all(group.host_bytes is not None for group in batch.groups)


def _with_head(counts: Sequence[int], facts: ModelFacts, frame: _Frame) -> Sequence[int]:
    """`counts` with all groups of the lm_head, the last batch, if it is resident."""
    if facts.head is None or not frame.head_resident:
        return counts
    return [*counts[:-1], len(facts.head.groups)]


def _head_rounding(facts: ModelFacts, request: Request, frame: _Frame) -> int:
    """What the lm_head takes besides its bytes, if it is resident: its groups share no memory with others."""
    if facts.head is None or not frame.head_resident or request.tier == HOST:
        return 0
    return roundings(facts.head.groups)[-1]


def _head(facts: ModelFacts, frame: _Frame) -> str:
    """Where the lm_head is, in a word."""
    if facts.head is None:
        return "resident" if facts.has_fixed_head else "none"
    return "resident" if frame.head_resident else "streamed"


def _batches(facts: ModelFacts, frame: _Frame) -> tuple[BatchFacts, ...]:
    return facts.batchings[frame.layers] + ((facts.head,) if facts.head is not None else ())


def _sizes(facts: ModelFacts, request: Request, frame: _Frame, placing: _Placing) -> _Sizes:
    """What decides whether a plan fits, without the names of what lies where."""
    batches = _batches(facts, frame)
    slabs = tuple(filter(None, (batch.slab_bytes[kept] for batch, kept in zip(batches, placing.resident, strict=True))))
    depth = frame.prefetch if frame.prefetch is not None else enough_ahead(slabs)
    tables = {name: group.nbytes for name, group in facts.tables.items() if name not in facts.tables_of_head}
    tables = tables if placing.with_tables else {}
    resident = facts.resident_bytes + sum(tables.values())
    hosted = 0
    for batch, kept, waiting in zip(batches, placing.resident, placing.hosted, strict=True):
        resident += batch.resident_bytes(kept)
        hosted += batch.host_bytes(kept, waiting)
    weights = Weights(_cached_ring_bytes(slabs, depth + 1), resident, placing.rounding_bytes, hosted)
    return _Sizes(depth, tables, weights, tiers_of(facts, request, frame.context, weights))


def _plan(facts: ModelFacts, request: Request, frame: _Frame, placing: _Placing) -> Plan:
    """The plan in which everything has been decided; it may not fit."""
    sizes = _sizes(facts, request, frame, placing)
    in_memory = sizes.tables.keys() | (facts.tables_of_head if frame.head_resident else frozenset())
    return Plan(
        model=facts.name,
        dtype=facts.dtype,
        kernels=facts.kernels,
        device=request.device,
        computes_on=request.tier,
        batches=tuple(map(_place, _batches(facts, frame), placing.resident, placing.hosted)),
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


def _place(batch: BatchFacts, resident: int, hosted: int) -> Batch:
    return Batch(
        units=batch.units,
        nbytes=batch.slab_bytes[resident],
        read_bytes=batch.read_bytes[resident + hosted],
        resident=batch.names(0, resident),
        resident_bytes=batch.resident_bytes(resident),
        hosted=batch.names(resident, resident + hosted),
        hosted_bytes=batch.host_bytes(resident, hosted),
    )


def enough_ahead(sizes: Sequence[int]) -> int:
    """How many batches to read ahead so that the disk never waits for room."""
    if not sizes:
        return 1
    average = max(sum(sizes) // len(sizes), 1)
    return min(-(-AHEAD_BYTES // average), MAX_AHEAD, max(len(sizes) - 1, 1))


def _fits(tiers: Mapping[str, Tier], without_ring: bool = False) -> bool:
    return all(
        tier.peak_bytes - (tier.items.get("ring", 0) if without_ring else 0) <= tier.budget_bytes
        for tier in tiers.values()
    )
