"""What a converter of transformers does to tensors, found out without their values.

A converter is run on tensors of row numbers: if it only moves rows, what comes out is a byte plan. If it transposes or
computes, or makes an object of packed tensors, its sources are read raw, and it runs each time they have been read.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from airstream.allocations import Allocations
from airstream.checkpoint.index import CheckpointIndex, StoredTensor
from airstream.compat import KeyConversion
from airstream.errors import CheckpointError
from airstream.pieces import TORCH_DTYPES, dealt_piece, dtype_of, item_of, piece_of
from airstream.row_numbers import dealt, is_permutation, runs
from airstream.tensors import RAW_PREFIX, Conversion, TensorSpec, plain_spec

__all__ = ["Known", "trace"]

Known = dict[Hashable, "Expansion | Moves"]
"""What is known of conversions, so that those of equal layers are run once: running them on nothing takes time, too."""


NUMBER = re.compile(r"\d+")
"""In the name of a weight: of its layer, say."""


@dataclass(frozen=True, slots=True)
class Expansion:
    """What a converter makes of packed tensors: shapes by name, and the bytes that it holds for a moment."""

    shapes: Mapping[str, tuple[int, ...]]
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Moves:
    """Where a converter that only moves rows takes those of one output from.

    Attributes:
        shape: of the output.
        runs: (first row in the output, number of the source, first row in it, how many rows).
        deal: (rows, ways) if it deals out the rows of its only source: then there is one run for each of them.
    """

    shape: tuple[int, ...]
    runs: tuple[tuple[int, int, int, int], ...]
    deal: tuple[int, int] | None = None


def trace(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    index: CheckpointIndex,
    targets: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.dtype],
    known: Known,
) -> list[TensorSpec]:
    """What one converter makes of `sources`: byte plans if it only moves rows, else specs that it has to make.

    It is run on row numbers, every row collapsed to a single one, which costs a thousandth of running it on weights.
    `known` is for all calls of one model, and gets what is found out.
    """
    stored = [index[key] for key, _ in sources]
    if conversion.unpacks(sources[0][1]):
        if len(sources) == 1 and (passed := _passed_through(conversion, name, sources, stored[0], targets)) is not None:
            return [passed]
        if conversion.makes_object(sources[0][1]):
            return [_object_of(conversion, name, sources, stored, wanted)]
    elif (specs := _specs_of_rows(conversion, name, sources, stored, targets, wanted, known)) is not None:
        return specs
    expansion = _expansion(conversion, name, sources, stored, (_shape_of(targets, name), wanted[name]), known)
    if expansion is None or any(_shape_of(targets, output) != shape for output, shape in expansion.shapes.items()):
        listed = ", ".join(f"{tensor.name!r} {list(tensor.shape)}" for tensor in stored[:3])
        raise CheckpointError(
            f"the model's {name!r} {list(targets[name].shape)} cannot be made of the checkpoint's {len(stored)} "
            f"tensors ({listed}, ...): one of them is missing or has the wrong shape"
        )
    patterns, raw = _raw_specs(conversion, sources, stored, wanted[name])
    elements = sum(math.prod(shape) for shape in expansion.shapes.values())
    made_by = Conversion(name, patterns, raw, max(expansion.peak_bytes, conversion.scratch_bytes(elements)))
    return [TensorSpec(output, wanted[output], shape, (), made_by) for output, shape in expansion.shapes.items()]


def _specs_of_rows(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    stored: Sequence[StoredTensor],
    targets: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.dtype],
    known: Known,
) -> list[TensorSpec] | None:
    """Byte plans, if the converter only moves rows; None if it does more.

    What was found out for one layer's many sources serves the others: the experts of a layer have millions of rows. One
    source has few, and how they move may depend on more than shapes: on the heads of just that layer, say.
    """
    width = _common_width(stored)
    if any(width % item_of(tensor.dtype)[0] for tensor in stored):
        return None  # a row is not made of whole blocks
    read_as = conversion.source_dtype(None, dtype_of(stored[0]), wanted[name])
    kind = NUMBER.sub("", name), _kind(sources, stored, _shape_of(targets, name), read_as)
    if len(stored) > 1 and isinstance(moves := known.get(kind), Moves):
        return [_spec_of_moves(name, moves, stored, width, read_as)]
    outputs = _try_convert(conversion, name, sources, _numbered(stored, width))
    if not outputs:
        return None
    dtypes = {
        output: conversion.source_dtype(None, dtype_of(stored[0]), wanted[output])
        for output in outputs
        if output in wanted
    }
    found = _moves_of(outputs, stored, width, targets, dtypes)
    if found is None:
        return _transposed_spec(outputs, stored, targets, wanted) if conversion.keeps_views else None
    if found.keys() == {name}:
        known[kind] = found[name]
    return [_spec_of_moves(output, moves, stored, width, dtypes[output]) for output, moves in found.items()]


def _kind(
    sources: Sequence[tuple[str, str]], stored: Sequence[StoredTensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Hashable:
    """What is the same for two weights that a converter treats alike."""
    patterns = tuple(pattern for _, pattern in sources)
    return shape, dtype, patterns, tuple((tensor.shape, tensor.dtype) for tensor in stored)


def _expansion(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    stored: Sequence[StoredTensor],
    target: tuple[tuple[int, ...], torch.dtype],
    known: Known,
) -> Expansion | None:
    """What the converter makes of tensors without values; None if it cannot. The same for the same kinds of tensors."""
    kind = _kind(sources, stored, *target)
    if isinstance(expansion := known.get(kind), Expansion):
        return replace(expansion, shapes={name: target[0]})
    shapes = [torch.empty(tensor.shape, dtype=dtype_of(tensor), device="meta") for tensor in stored]
    with Allocations(shapes) as allocations:
        outputs = _try_convert(conversion, name, sources, shapes)
    if outputs is None:
        return None
    found = Expansion({output: tuple(value.shape) for output, value in outputs.items()}, allocations.peak_bytes)
    if found.shapes == {name: target[0]}:
        known[kind] = found
    return found


def _passed_through(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    stored: StoredTensor,
    targets: Mapping[str, torch.Tensor],
) -> TensorSpec | None:
    """The byte plan of a tensor that is not packed, though the converter of packed ones sees it; None if it is.

    The converter may cast it. So it is run on numbers that every floating-point type of two bytes holds exactly.
    """
    dtype = TORCH_DTYPES[stored.dtype]
    if not dtype.is_floating_point or dtype.itemsize < 2 or stored.shape != _shape_of(targets, name):
        return None
    numbers = (_numbered([stored], _common_width([stored]))[0] % 251).to(dtype)
    passed = (_try_convert(conversion, name, sources, [numbers]) or {}).get(name)
    if passed is None or not torch.equal(passed.double(), numbers.double()):
        return None
    return plain_spec(name, stored, passed.dtype)


def _object_of(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    stored: Sequence[StoredTensor],
    wanted: Mapping[str, torch.dtype],
) -> TensorSpec:
    """A weight that is an object. Its own size is that of its largest source: of the packed weight."""
    patterns, raw = _raw_specs(conversion, sources, stored, wanted[name])
    made_by = Conversion(name, patterns, raw, *conversion.expansion(name), is_object=True)
    weight = max(raw, key=lambda source: source.nbytes)
    return TensorSpec(name, weight.dtype, weight.shape, (), made_by)


def _try_convert(
    conversion: KeyConversion, name: str, sources: Sequence[tuple[str, str]], tensors: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    try:
        return conversion.convert(name, [(*source, tensor) for source, tensor in zip(sources, tensors, strict=True)])
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AssertionError):
        return None  # it needs real shapes or values, or a source is missing: the caller finds out which


def _shape_of(targets: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    return tuple(targets[name].shape) if name in targets else ()


def _raw_specs(
    conversion: KeyConversion, sources: Sequence[tuple[str, str]], stored: Sequence[StoredTensor], wanted: torch.dtype
) -> tuple[tuple[str, ...], tuple[TensorSpec, ...]]:
    """`stored` as the converters of transformers get it: in its own shape, already cast; and the patterns."""
    patterns = tuple(pattern for _, pattern in sources)
    dtypes = [dtype_of(tensor) for tensor in stored]
    raw = tuple(
        plain_spec(RAW_PREFIX + tensor.name, tensor, conversion.source_dtype(pattern, dtype, wanted))
        for pattern, tensor, dtype in zip(patterns, stored, dtypes, strict=True)
    )
    return patterns, raw


def _common_width(stored: Sequence[StoredTensor]) -> int:
    """The length of the rows if all tensors have rows of one length, else 1."""
    widths = {tensor.shape[-1] if len(tensor.shape) > 1 else 1 for tensor in stored}
    return widths.pop() if len(widths) == 1 else 1


def _numbered(stored: Sequence[StoredTensor], width: int) -> list[torch.Tensor]:
    """Tensors shaped like `stored`, rows of `width` collapsed to one element, numbered through across all of them."""
    numbered, start = [], 0
    for tensor in stored:
        shape = (*tensor.shape[:-1], 1) if width > 1 else tensor.shape
        count = math.prod(shape)
        numbered.append(torch.arange(start, start + count).view(shape))
        start += count
    return numbered


def _moves_of(
    outputs: Mapping[str, torch.Tensor],
    stored: Sequence[StoredTensor],
    width: int,
    targets: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Moves] | None:
    """What a converter did to numbered tensors; None if it did more than move rows."""
    counts = [math.prod(tensor.shape) // width for tensor in stored]
    starts = [0, *itertools.accumulate(counts[:-1])]
    everything = torch.cat([ids.reshape(-1) for ids in outputs.values()])
    if not is_permutation(everything, sum(counts)):
        return None
    begins = torch.zeros(sum(counts) + 1, dtype=torch.bool)  # one more: an empty source may be the last
    begins[starts] = True
    found = {}
    for name, ids in outputs.items():
        shape = (*ids.shape[:-1], width) if width > 1 else tuple(ids.shape)
        if name not in targets or _shape_of(targets, name) != shape or (width > 1 and ids.shape[-1] != 1):
            return None
        deal = dealt(ids.reshape(-1)) if len(stored) == len(outputs) == 1 else None
        if deal is not None and dealt_piece(stored[0], width, *deal, dtypes[name]):
            found[name] = Moves(shape, (), deal)
            continue
        located = []
        for begin, first, count in runs(ids.reshape(-1), begins):
            number = bisect.bisect_right(starts, first) - 1
            located.append((begin, number, first - starts[number], count))
        found[name] = Moves(shape, tuple(located))
    return found


def _spec_of_moves(
    name: str, moves: Moves, stored: Sequence[StoredTensor], width: int, dtype: torch.dtype
) -> TensorSpec:
    if moves.deal is not None and (piece := dealt_piece(stored[0], width, *moves.deal, dtype)) is not None:
        return TensorSpec(name, dtype, moves.shape, (piece,), moved=True)
    row_bytes = [width // elements * nbytes for elements, nbytes in (item_of(tensor.dtype) for tensor in stored)]
    pieces = tuple(
        piece_of(stored[number], first * row_bytes[number], count * row_bytes[number], begin * row_bytes[number], dtype)
        for begin, number, first, count in moves.runs
    )
    return TensorSpec(name, dtype, moves.shape, pieces, moved=True)


def _transposed_spec(
    outputs: Mapping[str, torch.Tensor],
    stored: Sequence[StoredTensor],
    targets: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.dtype],
) -> list[TensorSpec] | None:
    """The byte plan of the one output if it is its source, transposed; a view that is no copy shows the same rows."""
    (name, ids), tensor = next(iter(outputs.items())), stored[0]
    count = tensor.shape[0]
    shape = tensor.shape[::-1]
    if len(stored) > 1 or len(shape) != 2 or _shape_of(targets, name) != shape or tuple(ids.shape) != (1, count):
        return None
    if not torch.equal(ids.flatten(), torch.arange(count)):
        return None
    piece = piece_of(tensor, 0, tensor.nbytes, 0, wanted[name])
    return [TensorSpec(name, wanted[name], shape, (piece,), moved=True, transposed=True)]
