"""This plans what would make a model faster: more memory, a faster disk, or smaller weights.

It knows plans. It refuses to know whether such a machine exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from airstream.plan.facts import BatchFacts, Group, ModelFacts
from airstream.plan.plan import Plan
from airstream.plan.planner import plan_or_none
from airstream.plan.policy import MORE_BYTES, WORTH_SAYING
from airstream.plan.request import HOST, Request
from airstream.rates.facts import Rate

FAST_DISK = Rate(7e9, "assumed: NVMe on PCIe 4")

FOUR_BIT = 4.5
"""Bits per weight of common 4-bit formats, the scales of their blocks included (Q4_0 of GGUF: 18 bytes for 32)."""


FEW_BYTES = 0.6
"""Of the dense weights': what has no more is packed in 8 bits or fewer already."""


Packed = Mapping[str, tuple[ModelFacts, Request]]
"""The same model packed, by what to ask for that."""

NOTHING: Packed = {}


def with_advice(plan: Plan, facts: ModelFacts, request: Request, packed: Packed = NOTHING) -> Plan:
    """`plan` with what would make decoding faster, and how many times. Plans several times over.

    Args:
        packed: stands first, in its order, and in the place of a guess about smaller weights; then comes what helps
            most.
    """
    if plan.prediction is None:
        return plan
    factors = {}
    others = _alternatives(facts, request, is_packed=bool(packed))
    for what, other_facts, other_request in (*((what, *each) for what, each in packed.items()), *others):
        other = plan_or_none(other_facts, other_request)
        if other is not None and other.prediction is not None:
            factors[what] = round(plan.prediction.decode_seconds / other.prediction.decode_seconds, 2)
    worth = {what: factor for what, factor in factors.items() if factor >= WORTH_SAYING}
    first = {what: worth[what] for what in packed if what in worth}
    rest = sorted(((factor, what) for what, factor in worth.items() if what not in first), reverse=True)
    return replace(plan, would_help=first | {what: factor for factor, what in rest})


def _alternatives(facts: ModelFacts, request: Request, is_packed: bool) -> Iterator[tuple[str, ModelFacts, Request]]:
    for tier, budget in request.budgets.items():
        name = "RAM" if tier == HOST else "device memory"
        yield f"+8 GiB of {name}", facts, replace(request, budgets={**request.budgets, tier: budget + MORE_BYTES})
    hardware = request.hardware
    if hardware is not None and hardware.disk.per_second < FAST_DISK.per_second:
        yield "a 7 GB/s disk", facts, replace(request, hardware=replace(hardware, disk=FAST_DISK))
    if not is_packed and _stored_share(facts) > FEW_BYTES:
        yield "4-bit weights", quantised(facts, FOUR_BIT), request


def _stored_share(facts: ModelFacts) -> float:
    """What the layers take on disk, as a share of what they would take as dense weights."""
    sums, item_bytes = facts.arithmetic, facts.footprint.item_bytes
    stored = sum(batch.read_bytes[0] for batch in next(iter(facts.batchings.values())))
    return stored / max(sums.num_weights * item_bytes - sums.head_bytes, 1)


def quantised(facts: ModelFacts, bits: float) -> ModelFacts:
    """`facts` of the same model whose layers are stored, moved and kept with `bits` per weight.

    The lm_head, the embeddings and what is small stay as they are, as in most quantised checkpoints. Expanding the
    weights is taken to cost nothing beside reading them.
    """
    share = bits / (8 * facts.footprint.item_bytes)
    sums = facts.arithmetic
    in_layers = sums.weight_bytes - sums.head_bytes
    return replace(
        facts,
        batchings={
            count: tuple(_scaled(batch, share) for batch in batches) for count, batches in facts.batchings.items()
        },
        checkpoint_bytes=facts.checkpoint_bytes - in_layers + int(share * in_layers),
        arithmetic=replace(
            sums,
            weight_bytes=sums.head_bytes + int(share * in_layers),
            expert_bytes=int(share * sums.expert_bytes),
        ),
    )


def _scaled(batch: BatchFacts, share: float) -> BatchFacts:
    groups = tuple(
        Group(each.names, int(share * each.nbytes), None if each.host_bytes is None else int(share * each.host_bytes))
        for each in batch.groups
    )
    slabs, reads = ([int(share * nbytes) for nbytes in sizes] for sizes in (batch.slab_bytes, batch.read_bytes))
    return BatchFacts(batch.units, groups, tuple(slabs), tuple(reads))
