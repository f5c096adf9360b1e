"""This renames thousands of checkpoint keys that differ in nothing but their numbers, by renaming one of each kind.

It knows numbers, and which renames cannot tell one from another. It refuses to know what the renames are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from transformers.core_model_loading import WeightConverter, WeightRenaming

Renamed = tuple[str, str | None]
"""The new name, and the pattern of the converter that makes it, if any."""

NUMBER = re.compile(r"([0-9]+)")

NO_DIGIT = re.compile(r"\\d|\(\?P<g[0-9]+>")
"""What a pattern may have that looks like a digit, or stands for any of them."""

MAX_NUMBERS = 4
"""In a key. There are twice as many numbers of one digit, without the zero."""


class _Template(NamedTuple):
    text: str
    places: tuple[int, ...]
    """For every number in the text, which one of the key it is."""
    pattern: str | None


class Renames:
    """`rename`, which is a function of the key alone, run once for keys that have the same text and as many digits."""

    def __init__(self, rename: Callable[[str], Renamed], entries: Sequence[WeightRenaming | WeightConverter]) -> None:
        self._rename = rename
        self._known: dict[Hashable, _Template | None] = {}
        self._is_blind = all(map(_is_blind, entries))

    def __call__(self, key: str) -> Renamed:
        if not self._is_blind:
            return self._rename(key)
        pieces = NUMBER.split(key)
        numbers = pieces[1::2]
        kind = (*pieces[::2], *map(len, numbers))
        if kind not in self._known:
            self._known[kind] = self._template(pieces)
        template = self._known[kind]
        if template is None:
            return self._rename(key)
        return template.text % tuple(numbers[place] for place in template.places), template.pattern

    def _template(self, pieces: Sequence[str]) -> _Template | None:
        """What becomes of keys like this one; None if that is not plain from what becomes of two of them."""
        lengths = [len(number) for number in pieces[1::2]]
        if len(lengths) > MAX_NUMBERS:
            return None
        low = [str(1 + place) * length for place, length in enumerate(lengths)]
        high = [str(9 - place) * length for place, length in enumerate(lengths)]
        (low_name, pattern), (high_name, other) = (self._rename(_joined(pieces, numbers)) for numbers in (low, high))
        (text, *lows), (other_text, *highs) = (NUMBER.split(name.replace("%", "%%")) for name in (low_name, high_name))
        if (text, lows[1::2], pattern) != (other_text, highs[1::2], other):
            return None
        places = []
        for one, two, after in zip(lows[::2], highs[::2], lows[1::2], strict=True):
            if one == two:  # a number of the rename's own
                text += one + after
            elif (one, two) in (pairs := list(zip(low, high, strict=True))):
                places.append(pairs.index((one, two)))
                text += "%s" + after
            else:
                return None
        return _Template(text, tuple(places), pattern)


def _joined(pieces: Sequence[str], numbers: Sequence[str]) -> str:
    joined = list(pieces)
    joined[1::2] = numbers
    return "".join(joined)


def _is_blind(entry: WeightRenaming | WeightConverter) -> bool:
    """Whether it treats all digits alike: it has no code of its own for names, and no digit in its patterns."""
    if type(entry).rename_source_key not in (WeightRenaming.rename_source_key, WeightConverter.rename_source_key):
        return False
    prefixes = (getattr(entry, name, None) or "" for name in ("scope_prefix", "base_model_prefix"))
    return not any(NUMBER.search(NO_DIGIT.sub("", text)) for text in (entry.compiled_sources.pattern, *prefixes))
