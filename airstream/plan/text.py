"""This says of plans, beside others, how one differs from the next, and that not even the smallest one fits."""

from __future__ import annotations

from collections.abc import Mapping

from airstream.plan.plan import Plan, Tier, tier_name
from airstream.plan.policy import AUTO_SHARE
from airstream.reporting.units import MIB, counted, format_bytes

NOTHING: Mapping[str, str] = {}


def change_of(before: Plan, after: Plan) -> str:
    """What becomes of weights when one plan follows another, in words; nothing if all stay where they are."""
    less, is_more = before.resident_bytes - after.resident_bytes, after.streamed_bytes > before.streamed_bytes
    parts = [f"{format_bytes(less)} of resident weights are streamed from now on"] if less > 0 and is_more else []
    made = after.made_bytes - before.made_bytes
    if made > 0:
        parts.append(f"{format_bytes(made)} of weights stay packed from now on, and are made dense in every pass")
    hosted = before.hosted_bytes - after.hosted_bytes
    if after.read_bytes > before.read_bytes and hosted > 0:
        parts.append(f"{format_bytes(hosted)} of what waited in host memory come from disk")
    if before.prefetch_batches and not after.prefetch_batches:
        parts.append("nothing is read ahead")
    return ", ".join(parts)


def too_small(plan: Plan, described: Mapping[str, str] = NOTHING, shorter: int = 0) -> str:
    """The message for a budget that even `plan`, the smallest there is, does not fit; a `shorter` context may.

    Args:
        described: as in a request.
    """
    nbytes, largest = max(((batch.nbytes, batch.units[0]) for batch in plan.batches), default=(0, "nothing"))
    needs = []
    for name, tier in plan.tiers.items():
        if _is_short(tier):
            parts = " + ".join(f"{label} {format_bytes(nbytes)}" for label, nbytes in tier.items.items() if nbytes)
            needs.append(
                f"{tier_name(name)} needs {format_bytes(tier.peak_bytes)} ({parts}), "
                f"{_source(described.get(name), tier)} {format_bytes(tier.budget_bytes)}"
            )
    budgets = {name: tier for name, tier in plan.tiers.items() if name not in described}
    sizes = ", ".join(f"{_key(name)}: {_rounded_up(tier.peak_bytes)}" for name, tier in budgets.items())
    remedies = [f"max_memory={{{sizes}}}"] if any(map(_is_short, budgets.values())) else []
    remedies += [
        _larger(described[name], tier) for name, tier in plan.tiers.items() if name in described and _is_short(tier)
    ]
    instead = (
        f"max_context={shorter} would fit; longer prompts are read in pieces by generate(..., prefill_chunk_size=), as "
        "far as their KV cache fits. "
        if shorter
        else ""
    )
    return (
        f"{plan.model} does not fit: {'; '.join(needs)}. {instead}The largest layer batch is {largest!r} with "
        f"{format_bytes(nbytes)}; the smallest budget that would do, for batches of {plan.max_batch_size} x "
        f"{counted(plan.max_context, 'token')}, is {' and '.join(remedies)}"
    )


def _is_short(tier: Tier) -> bool:
    return tier.peak_bytes > tier.budget_bytes


def _source(argument: str | None, tier: Tier) -> str:
    """Who gives a budget, and what it is a share of."""
    return "max_memory gives" if argument is None else f"{argument}= ({tier.budget_note}) gives"


def _larger(argument: str, tier: Tier) -> str:
    """The memory of a described machine whose share is enough for `tier`."""
    nbytes = int(tier.peak_bytes / AUTO_SHARE) + 1
    return f"ram={_rounded_up(nbytes)}" if argument == "ram" else f"a gpu= of {format_bytes(nbytes)}"


def _rounded_up(nbytes: int) -> str:
    return f'"{-(-nbytes // MIB)}MiB"'


def _key(name: str) -> str:
    return name if name.isdigit() else f'"{name}"'
