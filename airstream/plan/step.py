"""A step is one walk over the layers, as whoever drives decoding says it: what it computes, and what it gives.

It is numbers. It refuses to know when they are known: what a walk gives is said when it is over.
"""

from __future__ import annotations

from dataclasses import dataclass

from airstream.plan.request import Workload


@dataclass(frozen=True, slots=True)
class Step:
    """One walk over the layers.

    Attributes:
        sequences: the sequences that it computes.
        tokens: the new tokens of each of them that go in.
        kept: the positions of each of them that get logits.
        accepted: the tokens that it gives each sequence: none if there is more of the prompt to come, several where
            drafted tokens are checked.
    """

    sequences: int
    tokens: int
    kept: int
    accepted: int

    @classmethod
    def of(cls, work: Workload | None, accepted: int) -> Step:
        """The walk that computes `work`, of which nothing is known if that is None."""
        return cls(0, 0, 0, accepted) if work is None else cls(work.batch_size, work.tokens, work.logits, accepted)
