"""This runs a converter of transformers on shapes alone, on the meta device: no values, no memory.

It knows what comes out, how much memory it takes for a moment, and which results are views of what it was given: so
where in memory a resident model has them. It refuses to know what bytes they are of a file.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from airstream.checkpoint.stored import StoredTensor
from airstream.compat.key_conversion import KeyConversion
from airstream.compat.quiet import quiet_converters
from airstream.footprint.allocations import Allocations, memory_of
from airstream.layout.pieces import dtype_of
from airstream.layout.tensors import CACHE_LINE_BYTES

__all__ = ["Expansion", "Expansions", "Origin", "expand", "conversion_kind", "try_convert"]

NUMBER = re.compile(r"\d+")
"""A number in the name of a weight: that of its layer, say."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The memory that a result of a converter lies in.

    Attributes:
        source: the number of the source that it is a view of; None if its memory is not that of a source.
        start: the first byte of the result in that memory.
        is_run: it is elements of that memory in their order, and the converter has changed none of them.
    """

    source: int | None
    start: int
    is_run: bool

    def line_offset(self, stored: Sequence[StoredTensor], dtype: torch.dtype) -> int:
        """Its offset within a cache line in a resident model, whose sources are `stored`, cast to `dtype`.

        Memory that torch allocates starts with a line.
        """
        start = self.start
        if self.source is not None and dtype_of(stored[self.source]) == dtype:
            mapped = stored[self.source].resident_offset
            start += stored[self.source].offset if mapped is None else mapped
        return start % CACHE_LINE_BYTES


@dataclass(frozen=True, slots=True)
class Expansion:
    """What a converter makes of tensors: shapes and origins by name, and the bytes that it holds for a moment."""

    shapes: Mapping[str, tuple[int, ...]]
    origins: Mapping[str, Origin]
    peak_bytes: int


Expansions = dict[Hashable, Expansion]
"""What is known of conversions, so that those of equal layers are run once: running them on nothing takes time, too."""


def conversion_kind(
    name: str,
    sources: Sequence[tuple[str, str]],
    stored: Sequence[StoredTensor],
    target: tuple[tuple[int, ...], torch.dtype],
) -> Hashable:
    """What is the same for weights that a converter treats alike: all but the numbers in their names."""
    patterns = tuple(pattern for _, pattern in sources)
    return NUMBER.sub("", name), target, patterns, tuple((tensor.shape, tensor.dtype) for tensor in stored)


def expand(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    stored: Sequence[StoredTensor],
    target: tuple[tuple[int, ...], torch.dtype],
    known: Expansions,
) -> Expansion | None:
    """What the converter makes of tensors without values; None if it cannot. The same for the same kinds of tensors."""
    kind = conversion_kind(name, sources, stored, target)
    if kind in known:
        (origin,) = known[kind].origins.values()
        return replace(known[kind], shapes={name: target[0]}, origins={name: origin})
    dtypes = [
        conversion.source_dtype(pattern, dtype_of(tensor), target[1])
        for (_, pattern), tensor in zip(sources, stored, strict=True)
    ]
    shapes = [
        torch.empty(tensor.shape, dtype=dtype, device="meta") for tensor, dtype in zip(stored, dtypes, strict=True)
    ]
    into = torch.empty(target[0], dtype=target[1], device="meta")
    with quiet_converters(), Allocations([*shapes, into]) as allocations:
        outputs = try_convert(conversion, name, sources, shapes, into)
    if outputs is None:
        return None
    found = Expansion(
        {output: tuple(value.shape) for output, value in outputs.items()},
        {output: _origin(value, shapes) for output, value in outputs.items()},
        allocations.peak_bytes,
    )
    if found.shapes == {name: target[0]}:
        known[kind] = found
    return found


def _origin(output: torch.Tensor, sources: Sequence[torch.Tensor]) -> Origin:
    """Where `output` of a converter that was given `sources`, freshly made, lies."""
    start = int(output.storage_offset()) * output.itemsize
    for number, source in enumerate(sources):
        if memory_of(output) == memory_of(source):
            is_run = output.is_contiguous() and output.dtype == source.dtype and source._version == 0
            return Origin(number, start, is_run)
    return Origin(None, start, is_run=False)


def try_convert(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    tensors: Sequence[torch.Tensor],
    into: torch.Tensor | None = None,
) -> dict[str, torch.Tensor] | None:
    """What the converter `name` makes of `tensors`, by name, as `KeyConversion.convert` does; None if it fails."""
    given = [(*source, tensor) for source, tensor in zip(sources, tensors, strict=True)]
    try:
        return conversion.convert(name, given, into)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AssertionError, ArithmeticError):
        return None  # it needs real shapes or values, or a source is missing: the caller finds out which
