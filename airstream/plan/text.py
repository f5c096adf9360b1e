"""Plans in words: the printed table, and the message for a budget that is too small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from airstream.plan.request import HOST
from airstream.units import MIB, counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from airstream.plan.plan import Plan


def describe(plan: Plan) -> str:
    """`plan` as a table of at most 100 columns."""
    return "\n".join((*_model_lines(plan), *_time_lines(plan), *_tier_lines(plan)))


def _model_lines(plan: Plan) -> Iterator[str]:
    yield f"{plan.model} ({format_bytes(plan.checkpoint_bytes)}, {plan.dtype}) on {plan.device}"
    yield f"  resident     {_resident(plan)}"
    if plan.hosted_bytes:
        rest = f"{format_bytes(plan.read_bytes)} from disk" if plan.read_bytes else "nothing from disk"
        yield f"  host memory  {format_bytes(plan.hosted_bytes)} of what is streamed comes from there, {rest}"
    yield f"  streamed     {_streamed(plan)}"
    yield f"  lm_head      {plan.head}"
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
        yield f"               measured {note} (airstream hardware --refresh)"
    if plan.would_help:
        yield f"  would help   {', '.join(f'{what}: {factor:.1f}x' for what, factor in plan.would_help.items())}"


def _resident(plan: Plan) -> str:
    whole = sum(batch.nbytes == 0 for batch in plan.batches)
    partial = sum(bool(batch.resident) and batch.nbytes > 0 for batch in plan.batches)
    parts = [
        f"{whole} of {counted(len(plan.batches), 'batch')}" if whole else "",
        f"parts of {partial}" if partial else "",
    ]
    return f"{format_bytes(plan.resident_bytes)}: {', '.join(filter(None, parts)) or 'nothing'}"


def _streamed(plan: Plan) -> str:
    count = sum(batch.nbytes > 0 for batch in plan.batches)
    if not count:
        return "nothing: all of it is in memory after the first pass"
    reads = "around the page cache" if plan.direct_io else "through the page cache"
    ahead = f"{plan.prefetch_batches} ahead" if plan.prefetch_batches else "none ahead"
    return (
        f"{counted(count, 'batch')} of {counted(plan.layers_per_batch, 'layer')}, "
        f"{format_bytes(plan.streamed_bytes)} a pass, {ahead}, {reads}"
    )


def _tier_lines(plan: Plan) -> Iterator[str]:
    for name, tier in plan.tiers.items():
        yield (
            f"  {_tier_name(name):<13}peak {format_bytes(tier.peak_bytes)} of {format_bytes(tier.budget_bytes)} "
            f"({tier.budget_note})"
        )
        for label, nbytes in tier.items.items():
            if nbytes:
                yield f"    {label:<18}{format_bytes(nbytes):>10}"


def change_of(before: Plan, after: Plan) -> str:
    """What becomes of weights when one plan follows another, in words; nothing if all stay where they are."""
    less = before.resident_bytes - after.resident_bytes
    parts = [f"{format_bytes(less)} of resident weights are streamed from now on"] if less > 0 else []
    hosted = before.hosted_bytes - after.hosted_bytes
    if after.read_bytes > before.read_bytes and hosted > 0:
        parts.append(f"{format_bytes(hosted)} of what waited in host memory come from disk")
    if before.prefetch_batches and not after.prefetch_batches:
        parts.append("nothing is read ahead")
    return ", ".join(parts)


def too_small(plan: Plan, shorter: int = 0) -> str:
    """The message for a budget that even `plan`, the smallest there is, does not fit; a `shorter` context may."""
    nbytes, largest = max(((batch.nbytes, batch.units[0]) for batch in plan.batches), default=(0, "nothing"))
    needs = []
    for name, tier in plan.tiers.items():
        if tier.peak_bytes > tier.budget_bytes:
            parts = " + ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in tier.items.items() if nbytes)
            needs.append(
                f"{_tier_name(name)} needs {format_bytes(tier.peak_bytes)} ({parts}), "
                f"max_memory gives {format_bytes(tier.budget_bytes)}"
            )
    remedy = ", ".join(f"{_key(name)}: {_rounded_up(tier.peak_bytes)}" for name, tier in plan.tiers.items())
    instead = (
        f"max_context={shorter} would fit; longer prompts are read in pieces by generate(..., prefill_chunk_size=), as "
        "far as their KV cache fits. "
        if shorter
        else ""
    )
    return (
        f"{plan.model} does not fit: {'; '.join(needs)}. {instead}The largest layer batch is {largest!r} with "
        f"{format_bytes(nbytes)}; the smallest budget that would do, for batches of {plan.max_batch_size} x "
        f"{counted(plan.max_context, 'token')}, is max_memory={{{remedy}}}"
    )


def _rounded_up(nbytes: int) -> str:
    return f'"{-(-nbytes // MIB)}MiB"'


def _key(name: str) -> str:
    return name if name.isdigit() else f'"{name}"'


def _tier_name(name: str) -> str:
    return "host memory" if name == HOST else f"device {name}"
