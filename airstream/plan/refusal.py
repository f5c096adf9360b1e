"""This says of work that does not fit what it needs, and which smaller work would fit in the same memory.

It knows sizes and numbers of positions, and refuses work that the model has no positions for. It refuses to decide
whether work fits into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from airstream.errors import ArgumentError
from airstream.footprint.formulas import Footprint
from airstream.plan.facts import ModelFacts
from airstream.plan.policy import MIN_CHUNK
from airstream.plan.request import Workload
from airstream.reporting.units import counted, format_bytes


def too_much(work: Workload, need: Footprint, left: int) -> str:
    """The message for work that does not fit into `left` bytes, the most that the budgets leave for it."""
    new = f"{work.tokens:,} of them new" if not work.prompt else f"a prompt of {work.prompt:,}"
    images = ", images" if work.pixel_values else ""
    beyond = (
        ""
        if work.context <= need.max_position
        else f". The model was made for {counted(need.max_position, 'position')}"
    )
    remedies = ["raise max_memory", *remedies_for(work, need, left)]
    return (
        f"{work.batch_size} x {counted(work.context, 'token')} ({new}, logits of {work.logits:,}{images}) need "
        f"{format_bytes(work.bytes(need))} for KV cache and activations, max_memory leaves {format_bytes(left)}{beyond}"
        f". What would help: {'; '.join(remedies)}"
    )


def check_positions(facts: ModelFacts, work: Workload) -> None:
    """Refuse sequences that the model has no positions for, where those come from a table.

    Positions that are computed go on beyond what the model was made for, in transformers as here.

    Raises:
        ArgumentError: with the number of positions.
    """
    limit = facts.position_limit
    if limit is None or work.context <= limit:
        return
    answer = f" ({work.prompt:,} of the prompt, {work.context - work.prompt:,} new)" if work.prompt else ""
    raise ArgumentError(
        f"{counted(work.context, 'token')}{answer} are more than {facts.name} has positions for: its table has "
        f"{limit:,}. Shorten the prompt or max_new_tokens, whatever max_memory is"
    )


def remedies_for(work: Workload, need: Footprint, left: int) -> Iterator[str]:
    """What a caller can ask for instead, with the numbers that fit."""

    def largest(make: Callable[[int], Workload], limit: int) -> int:
        return most(lambda count: make(count).bytes(need) <= left, limit)

    if work.prompt and work.context > work.prompt:
        new = largest(lambda count: replace(work, context=work.prompt + count), work.context - work.prompt)
        if new:
            beyond = ", beyond what the model was made for" if work.prompt >= need.max_position else ""
            yield f"max_new_tokens={_advised(new, need.max_position - work.prompt)} would fit{beyond}"
            return
    answer = max(work.context - work.prompt, 0) if work.prompt else 0
    fits = largest(lambda count: of_length(work, count, answer), work.prompt or work.context)
    if fits:
        yield f"{counted(_advised(fits, need.max_position - answer), 'token')} would fit"
    chunk = largest(lambda count: replace(work, tokens=count, logits=1), work.tokens - 1)
    if chunk >= MIN_CHUNK:
        yield f"generate(..., prefill_chunk_size={chunk}) reads a prompt of this length in pieces that fit"
    if work.batch_size > 1 and (batch := largest(lambda count: replace(work, batch_size=count), work.batch_size - 1)):
        yield f"a batch of {batch} would fit"


def _advised(fits: int, positions: int) -> int:
    """As many tokens as fit, but no more than the model has `positions` left for, if any."""
    return min(fits, positions) if positions > 0 else fits


def of_length(work: Workload, tokens: int, answer: int) -> Workload:
    """The same work for prompts of so many tokens, of which as many are in the cache as can be."""
    cached = (work.prompt or work.context) - work.tokens
    new = max(tokens - cached, 1) if not work.prompt else min(work.tokens, tokens)
    logits = min(work.logits, new)
    return replace(work, context=tokens + answer, tokens=new, logits=logits, prompt=tokens if work.prompt else 0)


def most(holds: Callable[[int], bool], limit: int) -> int:
    """The largest count up to `limit` for which `holds`, which is false from some count on; 0 if it is for 1."""
    low, high = 0, max(limit, 0) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
