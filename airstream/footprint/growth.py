"""This says how the memory of a forward pass grows with its tokens: polynomials, found from passes of a few sizes.

There are no tensors here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

Size = tuple[int, int]
"""New tokens of a sequence, and all that they attend to, themselves included."""

FRESH_SIZES: tuple[Size, ...] = ((2, 2), (3, 3), (4, 4))
"""The sizes of passes over a prompt with an empty cache, in multiples of a length."""

CONTINUED_SIZES: tuple[Size, ...] = ((2, 5), (3, 5), (4, 5), (2, 6), (3, 6))
"""The sizes of passes over a part of a prompt whose beginning is in the cache."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What is alive at one moment of a pass, in bytes; exact where memory is proportional to what tensors hold."""

    fixed: Fraction
    per_token: Fraction
    per_context: Fraction
    per_pair: Fraction
    """For each new token and each that it may attend to."""
    per_square: Fraction
    """For each two of the new tokens."""

    def __call__(self, tokens: int, context: int) -> int:
        terms = self.per_token * tokens + self.per_context * context + self.per_pair * tokens * context
        return int(self.fixed + terms + self.per_square * tokens * tokens)

    def covers(self, other: Moment) -> bool:
        """Whether this is at least the other, whatever the size."""
        return all(mine >= theirs for mine, theirs in zip(self._terms, other._terms, strict=True))

    @property
    def _terms(self) -> tuple[Fraction, ...]:
        return (self.fixed, self.per_token, self.per_context, self.per_pair, self.per_square)


@dataclass(frozen=True, slots=True)
class Growth:
    """The most that a pass holds, whatever its size: the largest of its moments is not always the same one."""

    moments: tuple[Moment, ...]

    def __call__(self, tokens: int, context: int) -> int:
        return max((moment(tokens, context) for moment in self.moments), default=0)


@dataclass(frozen=True, slots=True)
class PassGrowth:
    """How the memory of a pass of one sequence grows, without the KV cache and the lm_head.

    Attributes:
        fresh: the growth of a prompt without padding and with an empty cache.
        continued: the growth of tokens that follow others in the cache, or have padding: they have a mask.
        window: from this context on these hold, where attention is limited to some of it.
    """

    fresh: Growth
    continued: Growth
    window: int = 0


def growth_of(sizes: Sequence[Size], alive: Sequence[Sequence[int]]) -> Growth | None:
    """From the bytes alive at every moment of passes of these sizes; None if they did not go the same way.

    Args:
        sizes: `FRESH_SIZES` or `CONTINUED_SIZES`, times a length.
        alive: for each of them.
    """
    if len({len(moments) for moments in alive}) != 1:
        return None
    solve = _fresh if len(sizes) == len(FRESH_SIZES) else _continued
    found = dict.fromkeys(solve(sizes, values) for values in dict.fromkeys(zip(*alive, strict=True)))
    return Growth(tuple(_largest(found)))


def _fresh(sizes: Sequence[Size], values: Sequence[int]) -> Moment:
    """The polynomial in the number of tokens through three equidistant values."""
    (first, _), (second, _), _ = sizes
    step = second - first
    square = Fraction(values[2] - 2 * values[1] + values[0], 2 * step * step)
    token = Fraction(values[1] - values[0], step) - square * (first + second)
    return Moment(values[0] - token * first - square * first * first, token, Fraction(0), Fraction(0), square)


def _continued(sizes: Sequence[Size], values: Sequence[int]) -> Moment:
    """The same in tokens, for one context; and a second context, for what grows with it."""
    (first, short), (second, _), _, (_, long), _ = sizes
    fresh = _fresh(sizes[:3], values[:3])
    of_first, of_second = (Fraction(values[place + 3] - values[place], long - short) for place in (0, 1))
    pair = (of_second - of_first) / (second - first)
    context = of_first - pair * first
    return Moment(fresh.fixed - context * short, fresh.per_token - pair * short, context, pair, fresh.per_square)


def _largest(moments: Iterable[Moment]) -> Iterator[Moment]:
    """Those that no other one covers."""
    kept: list[Moment] = []
    for moment in moments:
        if not any(other.covers(moment) for other in kept):
            kept = [other for other in kept if not moment.covers(other)]
            kept.append(moment)
    yield from kept
