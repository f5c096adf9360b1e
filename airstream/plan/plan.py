"""The plan says what stays in memory, what is streamed, through how much ring, and what the peak will be.

It has numbers and names only. It prints as a table and round-trips through JSON. It refuses to know how it was made;
whatever executes it decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from airstream.plan.predict import Prediction
from airstream.plan.request import HOST
from airstream.reporting.units import counted, format_bytes, format_seconds

RESIDENT, KV_CACHE, ACTIVATIONS = "resident weights", "KV cache", "activations"


@dataclass(frozen=True, slots=True)
class Batch:
    """Layers that move together, and where their tensors are between two uses.

    Attributes:
        units: the names of their modules, in order.
        nbytes: the bytes of the slab that passes through the ring; 0 if everything is resident.
        read_bytes: those of them that come from disk each time; the others come from host memory.
        resident: names of the tensors that stay on the device that computes, and `resident_bytes` of them.
        hosted: names of the tensors that stay in host memory and cross to the accelerator, `hosted_bytes` as they lie
            there: packed, if they are stored so.
        packed: names of the tensors that stay, packed, on the device that computes, and `packed_bytes` of them.
        made_bytes: the bytes of the slab that are made of them in every pass, and cross nothing.
    """

    units: tuple[str, ...]
    nbytes: int
    read_bytes: int
    resident: tuple[str, ...] = ()
    resident_bytes: int = 0
    hosted: tuple[str, ...] = ()
    hosted_bytes: int = 0
    packed: tuple[str, ...] = ()
    packed_bytes: int = 0
    made_bytes: int = 0

    @property
    def streamed_bytes(self) -> int:
        """The bytes that come from a disk or from host memory in every pass, as they lie in the ring."""
        return self.nbytes - self.made_bytes


@dataclass(frozen=True, slots=True)
class Tier:
    """One memory: its budget, and what the plan puts there, in bytes."""

    budget_bytes: int
    budget_note: str
    items: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        """The sum of all that the plan puts into this memory, in bytes."""
        return sum(self.items.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is going to run. Printable; `to_json` and `from_json` are inverse.

    Attributes:
        computes_on: the name of the tier whose memory the device computes in: that of the ring and of what is resident.
        batches: all layers, and the lm_head if it can be streamed, in the order in which the model lists them.
        layers_per_batch, prefetch_batches: layers that move together; batches that are read ahead.
        ring_bytes: memory on the device that what is streamed passes through.
        tables: embedding tables that are resident, by name, and their bytes.
        rows_from_disk: embedding tables of which only the rows needed are read.
        tiers: memory by name: "cpu", and the accelerator's index as a string.
        max_context, max_batch_size: tokens per sequence and sequences that KV cache and activations are planned for.
        prediction: how long it is going to take, if the rates of the machine were given.
        would_help: what would make decoding faster, and how many times, if that was asked for.
        kernels: "exact", or "fast" for products that round otherwise than transformers'.
    """

    model: str
    dtype: str
    device: str
    computes_on: str
    batches: tuple[Batch, ...]
    layers_per_batch: int
    prefetch_batches: int
    ring_bytes: int
    head: str
    tables: Mapping[str, int]
    rows_from_disk: Mapping[str, int]
    checkpoint_bytes: int
    direct_io: bool
    max_context: int
    max_batch_size: int
    tiers: Mapping[str, Tier] = field(default_factory=dict)
    prediction: Prediction | None = None
    would_help: Mapping[str, float] = field(default_factory=dict)
    kernels: str = "exact"

    @property
    def streamed_bytes(self) -> int:
        """Bytes that come into the ring, from disk or host memory, in one pass over all layers."""
        return sum(batch.streamed_bytes for batch in self.batches)

    @property
    def packed_bytes(self) -> int:
        """Weights that stay packed on the device that computes."""
        return sum(batch.packed_bytes for batch in self.batches)

    @property
    def made_bytes(self) -> int:
        """Bytes in the ring that are made of what stays packed, in one pass over all layers."""
        return sum(batch.made_bytes for batch in self.batches)

    @property
    def read_bytes(self) -> int:
        """Bytes that are read from disk in one pass over all layers, once what is resident has been loaded."""
        return sum(batch.read_bytes for batch in self.batches)

    @property
    def resident_bytes(self) -> int:
        """Weights that stay on the device that computes, though they could be streamed: dense, or packed."""
        return sum(batch.resident_bytes + batch.packed_bytes for batch in self.batches) + sum(self.tables.values())

    @property
    def hosted_bytes(self) -> int:
        """Weights that stay in host memory for an accelerator: packed, if they are stored so."""
        return sum(batch.hosted_bytes for batch in self.batches)

    @property
    def work_bytes(self) -> int:
        """What the budget of the computing device leaves for KV cache and activations once the weights are placed."""
        tier = self.tiers[self.computes_on]
        return tier.budget_bytes - tier.peak_bytes + tier.items[KV_CACHE] + tier.items[ACTIVATIONS]

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The predicted rise of each memory's use above what it was before `from_pretrained`."""
        return {name: tier.peak_bytes for name, tier in self.tiers.items()}

    def to_json(self) -> str:
        """The plan as JSON. Seconds and bytes are plain numbers."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` has written as `text`."""
        data = json.loads(text)
        data["batches"] = tuple(Batch(**_with_tuples(batch)) for batch in data["batches"])
        data["tiers"] = {name: Tier(**tier) for name, tier in data["tiers"].items()}
        if data["prediction"] is not None:
            data["prediction"] = Prediction.from_dict(data["prediction"])
        return cls(**data)

    def __str__(self) -> str:
        return describe(self)


def _with_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def describe(plan: Plan) -> str:
    """`plan` as a table of at most 100 columns."""
    return "\n".join((*_model_lines(plan), *_time_lines(plan), *_tier_lines(plan)))


def _model_lines(plan: Plan) -> Iterator[str]:
    yield f"{plan.model} ({format_bytes(plan.checkpoint_bytes)}, {plan.dtype}) on {plan.device}"
    yield f"  resident     {_resident(plan)}"
    if plan.packed_bytes:
        yield f"  packed       {format_bytes(plan.packed_bytes)} of that, made dense in every pass"
    if plan.hosted_bytes:
        rest = f"{format_bytes(plan.read_bytes)} from disk" if plan.read_bytes else "nothing from disk"
        yield f"  host memory  {format_bytes(plan.hosted_bytes)} wait there and cross in every pass, {rest}"
    yield f"  streamed     {_streamed(plan)}"
    yield f"  lm_head      {plan.head}"
    if plan.kernels != "exact":
        yield f"  kernels      {plan.kernels}: products with weights as they are stored, which round otherwise"
    for name, nbytes in plan.rows_from_disk.items():
        yield f"  rows only    {name} ({format_bytes(nbytes)} on disk)"
    yield f"  workload     up to {counted(plan.max_batch_size, 'sequence')} of {counted(plan.max_context, 'token')}"


def _time_lines(plan: Plan) -> Iterator[str]:
    expected = plan.prediction
    if expected is None:
        return
    rates = "measured rates" if not expected.assumed else f"not measured: {', '.join(expected.assumed)}"
    sequences = f" for {counted(expected.batch_size, 'sequence')}" if expected.batch_size > 1 else ""
    yield (
        f"  expected     {format_seconds(expected.decode_seconds)} a token{sequences}, bound by {expected.bottleneck} "
        f"({rates})"
    )
    yield (
        f"               first token of {expected.prompt_tokens:,} after {format_seconds(expected.prefill_seconds)}, "
        f"in later calls {format_seconds(expected.warm_prefill_seconds)}"
    )
    for note in expected.notes:
        yield f"               measured {note}"
    if expected.notes:
        yield "               airstream hardware --refresh, when the machine is idle, measures again"
    words = "would help"
    for what, factor in plan.would_help.items():
        yield f"  {words:11}  {what}: {format_seconds(expected.decode_seconds / factor)} a token, {factor:.1f}x as fast"
        words = ""


def _resident(plan: Plan) -> str:
    whole = sum(batch.streamed_bytes == 0 for batch in plan.batches)
    partial = sum(bool(batch.resident or batch.packed) and batch.streamed_bytes > 0 for batch in plan.batches)
    parts = [
        f"{whole} of {counted(len(plan.batches), 'batch')}" if whole else "",
        f"parts of {partial}" if partial else "",
        "embeddings" if plan.tables else "",
    ]
    nbytes = plan.tiers[plan.computes_on].items[RESIDENT]
    always = nbytes - plan.resident_bytes
    chosen = f"{format_bytes(plan.resident_bytes)} as it fits ({', '.join(filter(None, parts))})"
    kinds = [f"{format_bytes(always)} always" if always else "", chosen if plan.resident_bytes else "nothing else fits"]
    return f"{format_bytes(nbytes)}: {', '.join(filter(None, kinds))}"


def _streamed(plan: Plan) -> str:
    count = sum(batch.streamed_bytes > 0 for batch in plan.batches)
    if not count:
        return "nothing: all of it is in memory after the first pass"
    reads = "around the page cache" if plan.direct_io else "through the page cache"
    reads = reads if plan.read_bytes else "from host memory alone"
    ahead = f"{plan.prefetch_batches} ahead" if plan.prefetch_batches else "none ahead"
    return (
        f"{counted(count, 'batch')} of {counted(plan.layers_per_batch, 'layer')}, "
        f"{format_bytes(plan.streamed_bytes)} a pass, {ahead}, {reads}"
    )


def _tier_lines(plan: Plan) -> Iterator[str]:
    for name, tier in plan.tiers.items():
        yield (
            f"  {tier_name(name):<13}peak {format_bytes(tier.peak_bytes)} of {format_bytes(tier.budget_bytes)} "
            f"({tier.budget_note})"
        )
        for label, nbytes in tier.items.items():
            if nbytes:
                yield f"    {label:<18}{format_bytes(nbytes):>10}"


def tier_name(name: str) -> str:
    """The name of a tier of memory in print."""
    return "host memory" if name == HOST else f"device {name}"
