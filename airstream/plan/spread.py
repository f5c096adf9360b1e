"""This orders tensors for residency, so that any share of them lies evenly among what is streamed.

Access is cyclic, so every resident byte saves as much as any other, and a link that never idles wants what is left to
be spread evenly over the pass. It also keeps the ring small: if every layer streams a tenth of itself, a slot of the
ring is a tenth of a layer.

It knows the sizes of groups. It refuses to know how many of them stay.
"""

from __future__ import annotations

from collections.abc import Sequence

from airstream.plan.facts import BatchFacts, Group


def resident_order(batches: Sequence[BatchFacts]) -> list[int]:
    """The batch that gives its next group, at every step from nothing resident to everything.

    All batches keep about the same share of themselves; among those with an equal share, neighbours are far apart. Any
    two beginnings of the order are nested, so a plan for a little less memory differs in a few tensors only.
    """
    ranks = _spread_ranks(len(batches))
    steps = []
    for batch, rank in zip(range(len(batches)), ranks, strict=True):
        groups, kept = batches[batch].groups, 0
        total = sum(group.nbytes for group in groups) or 1
        for group in groups:
            steps.append((round(kept / total, 3), rank, batch))
            kept += group.nbytes
    return [batch for _, _, batch in sorted(steps)]


def in_order(batches: Sequence[BatchFacts], order: Sequence[int]) -> list[Group]:
    """The groups of `batches` in the order in which they are given."""
    groups = [iter(batch.groups) for batch in batches]
    return [next(groups[batch]) for batch in order]


def counts_after(order: Sequence[int], steps: int, num_batches: int) -> list[int]:
    """How many groups every batch has given after the first `steps` of `order`."""
    counts = [0] * num_batches
    for batch in order[:steps]:
        counts[batch] += 1
    return counts


def _spread_ranks(count: int) -> list[int]:
    """For each of `count` places, its turn in a sequence whose every beginning is spread evenly: bit reversal."""
    bits = max(count - 1, 0).bit_length()
    turns = sorted(range(count), key=lambda place: int(f"{place:0{bits}b}"[::-1] or "0", 2) if bits else 0)
    ranks = [0] * count
    for rank, place in enumerate(turns):
        ranks[place] = rank
    return ranks
