"""The plan: what stays in memory, what is streamed, through how much ring, and what the peak will be.

`make_plan` is a pure function of numbers: nothing is measured, loaded or allocated here. A `Plan` prints as a table and
round-trips through JSON. Execution holds no policy: whatever is decided about memory is decided here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from airstream.errors import BudgetError
from airstream.footprint import Footprint
from airstream.ring import ring_bytes
from airstream.units import MIB, format_bytes

HOST = "cpu"
KV_CACHE, ACTIVATIONS = "KV cache", "activations"

HOST_RUNTIME_BYTES = 32 * MIB
"""What a first forward pass adds to the host process on its own: lazily imported code, thread stacks, kernel caches."""

DEVICE_RUNTIME_BYTES = 128 * MIB
"""Matrix-multiplication workspaces and the rounding of the device's allocator."""

CONTEXTS = (4096, 2048, 1024, 512, 256, 128)
"""Contexts tried, in tokens, when `max_context` is not given: the longest that the budget holds is planned for."""

MIN_OVERLAPPED_CONTEXT = 512
"""Below this, rather give up reading ahead than context."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Layers that move together.

    Attributes:
        units: the names of their modules, in order.
        nbytes: of their slab.
    """

    units: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the planner has to know of a model.

    Attributes:
        batchings: for every number of layers per batch that may be chosen, best first, the batches it gives.
        head: the lm_head as a batch of its own if it can be streamed, else None.
        resident_bytes: weights and buffers that always stay in memory.
        rows_from_disk: tables of which only the rows needed are read: their names and sizes.
        rows_of_head: those among them that are in memory anyway once the head is, because they are tied to it.
        checkpoint_bytes: all weights.
        conversion_bytes: what a converter of transformers needs for its results before they are in place.
    """

    name: str
    dtype: str
    batchings: Mapping[int, tuple[Batch, ...]]
    head: Batch | None
    head_resident_bytes: int
    resident_bytes: int
    rows_from_disk: Mapping[str, int]
    rows_of_head: frozenset[str]
    checkpoint_bytes: int
    conversion_bytes: int
    has_tokenizer: bool
    footprint: Footprint


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; None means that the planner chooses.

    Attributes:
        budgets: bytes per tier: "cpu", and the index of the accelerator if one is used.
        budget_notes: per tier, where the budget comes from.
    """

    device: str
    budgets: Mapping[str, int]
    budget_notes: Mapping[str, str]
    prefetch_batches: int | None = None
    max_context: int | None = None
    max_batch_size: int = 1
    direct_io: bool = True
    staging_bytes: int = 0

    @property
    def tier(self) -> str:
        """The tier that the model computes in: "cpu", or the accelerator's index."""
        return self.device.partition(":")[2] or (HOST if self.device == HOST else "0")


@dataclass(frozen=True, slots=True)
class Tier:
    """One memory: its budget, and what the plan puts there, in bytes."""

    budget_bytes: int
    budget_note: str
    items: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is going to run. Printable; `to_json` and `from_json` are inverse.

    Attributes:
        batches: what is streamed, in the order in which the model lists it.
        layers_per_batch, prefetch_batches: layers that move together; batches that are read ahead.
        ring_bytes: memory on the device that the batches pass through.
        head: where the lm_head is: "resident", "streamed", or "none" if the model has no separate one.
        tiers: memory by name: "cpu", and the accelerator's index as a string.
        max_context, max_batch_size: tokens per sequence and sequences that KV cache and activations are planned for.
    """

    model: str
    dtype: str
    device: str
    batches: tuple[Batch, ...]
    layers_per_batch: int
    prefetch_batches: int
    ring_bytes: int
    head: str
    rows_from_disk: Mapping[str, int]
    checkpoint_bytes: int
    direct_io: bool
    max_context: int
    max_batch_size: int
    tiers: Mapping[str, Tier] = field(default_factory=dict)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross the ring in one pass over all layers."""
        return sum(batch.nbytes for batch in self.batches)

    @property
    def work_bytes(self) -> int:
        """What the budget of the computing device leaves for KV cache and activations once the weights are placed."""
        tier = next(iter(self.tiers.values()))
        return tier.budget_bytes - tier.peak_bytes + tier.items[KV_CACHE] + tier.items[ACTIVATIONS]

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The predicted rise of each memory's use above what it was before `from_pretrained`."""
        return {name: tier.peak_bytes for name, tier in self.tiers.items()}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        data = json.loads(text)
        data["batches"] = tuple(Batch(tuple(batch["units"]), batch["nbytes"]) for batch in data["batches"])
        data["tiers"] = {name: Tier(**tier) for name, tier in data["tiers"].items()}
        return cls(**data)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def make_plan(facts: ModelFacts, request: Request) -> Plan:
    """The best plan that fits the budgets.

    Preferred, in this order: reading ahead, a longer context, a resident lm_head, larger batches, more batches ahead.

    Raises:
        BudgetError: not even the smallest plan fits; the message has the smallest budgets that would do.
    """
    smallest: Plan | None = None
    for plan in _candidates(facts, request):
        if all(tier.peak_bytes <= tier.budget_bytes for tier in plan.tiers.values()):
            return plan
        if smallest is None or sum(plan.peak_bytes.values()) < sum(smallest.peak_bytes.values()):
            smallest = plan
    assert smallest is not None  # there is always a candidate
    raise BudgetError(_too_small(smallest))


def _candidates(facts: ModelFacts, request: Request) -> Iterator[Plan]:
    """Every plan worth considering, best first."""
    depths = (2, 1, 0) if request.prefetch_batches is None else (request.prefetch_batches,)
    longest = facts.footprint.max_position
    contexts = [min(longest, tokens) for tokens in CONTEXTS] if request.max_context is None else [request.max_context]
    overlapped = [context for context in contexts if context >= MIN_OVERLAPPED_CONTEXT] or contexts
    heads = (True, False) if facts.head is not None else (True,)
    ahead = [depth for depth in depths if depth > 0]
    for allowed_contexts, allowed_depths in ((overlapped, ahead), (contexts, depths)):
        for context in dict.fromkeys(allowed_contexts):
            for head_resident in heads:
                for layers in facts.batchings:
                    for depth in allowed_depths:
                        yield _plan(facts, request, layers, depth, head_resident, context)


def _plan(facts: ModelFacts, request: Request, layers: int, prefetch: int, head_resident: bool, context: int) -> Plan:
    streamed_head = (facts.head,) if facts.head is not None and not head_resident else ()
    batches = (*facts.batchings[layers], *streamed_head)
    ring = ring_bytes([batch.nbytes for batch in batches], prefetch + 1)
    resident = facts.resident_bytes + (facts.head_resident_bytes if head_resident else 0)
    need = facts.footprint
    work = {
        "ring": ring,
        "resident weights": resident,
        KV_CACHE: need.kv_bytes(request.max_batch_size, context),
        ACTIVATIONS: need.activation_bytes(request.max_batch_size, context, context),
        "conversion": facts.conversion_bytes,
    }
    host = {
        "staging": request.staging_bytes,
        "tokenizer": need.tokenizer_bytes if facts.has_tokenizer else 0,
        "runtime": HOST_RUNTIME_BYTES,
    }
    items = {HOST: work | host}
    if request.tier != HOST:
        items = {request.tier: work | {"runtime": DEVICE_RUNTIME_BYTES}, HOST: host}
    in_memory = facts.rows_of_head if head_resident else frozenset()
    return Plan(
        model=facts.name,
        dtype=facts.dtype,
        device=request.device,
        batches=batches,
        layers_per_batch=layers,
        prefetch_batches=prefetch,
        ring_bytes=ring,
        head="none" if facts.head is None else "resident" if head_resident else "streamed",
        rows_from_disk={name: size for name, size in facts.rows_from_disk.items() if name not in in_memory},
        checkpoint_bytes=facts.checkpoint_bytes,
        direct_io=request.direct_io,
        max_context=context,
        max_batch_size=request.max_batch_size,
        tiers={name: Tier(request.budgets[name], request.budget_notes[name], parts) for name, parts in items.items()},
    )


def _too_small(plan: Plan) -> str:
    """The message for a budget that even `plan`, the smallest there is, does not fit."""
    largest = max(plan.batches, key=lambda batch: batch.nbytes, default=Batch(("nothing",), 0))
    needs = []
    for name, tier in plan.tiers.items():
        if tier.peak_bytes > tier.budget_bytes:
            parts = " + ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in tier.items.items() if nbytes)
            needs.append(
                f"{_tier_name(name)} needs {format_bytes(tier.peak_bytes)} ({parts}), "
                f"max_memory gives {format_bytes(tier.budget_bytes)}"
            )
    remedy = ", ".join(f"{_key(name)}: {_rounded_up(tier.peak_bytes)}" for name, tier in plan.tiers.items())
    return (
        f"{plan.model} does not fit: {'; '.join(needs)}. The largest layer batch is {largest.units[0]!r} with "
        f"{format_bytes(largest.nbytes)}; the smallest budget that would do, for batches of {plan.max_batch_size} x "
        f"{plan.max_context} tokens, is max_memory={{{remedy}}}"
    )


def _rounded_up(nbytes: int) -> str:
    return f'"{-(-nbytes // MIB)}MiB"'


def _key(name: str) -> str:
    return name if name.isdigit() else f'"{name}"'


def _tier_name(name: str) -> str:
    return "host memory" if name == HOST else f"device {name}"


def _lines(plan: Plan) -> Sequence[str]:
    reads = "around the page cache" if plan.direct_io else "through the page cache"
    ahead = f"{plan.prefetch_batches} ahead" if plan.prefetch_batches else "none ahead"
    lines = [
        f"{plan.model} ({format_bytes(plan.checkpoint_bytes)}, {plan.dtype}) on {plan.device}",
        f"  streamed     {len(plan.batches)} batches of {plan.layers_per_batch} layer(s), "
        f"{format_bytes(plan.streamed_bytes)} a pass, {ahead}, {reads}",
        f"  lm_head      {plan.head}",
        *(f"  rows only    {name} ({format_bytes(nbytes)} on disk)" for name, nbytes in plan.rows_from_disk.items()),
        f"  workload     up to {plan.max_batch_size} sequence(s) of {plan.max_context:,} tokens",
    ]
    for name, tier in plan.tiers.items():
        lines.append(
            f"  {_tier_name(name):<13}peak {format_bytes(tier.peak_bytes)} of {format_bytes(tier.budget_bytes)} "
            f"({tier.budget_note})"
        )
        lines += [f"    {label:<18}{format_bytes(nbytes):>10}" for label, nbytes in tier.items.items() if nbytes]
    return lines
