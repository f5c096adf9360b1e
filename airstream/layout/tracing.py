"""This finds out what a converter of transformers does to tensors, without their values.

A converter is run on shapes alone: what comes out tells which results are views of what it was given, and so where in
memory a resident model has them. It is run on tensors of row numbers: if it only moves rows, what comes out is a byte
plan. If it transposes or computes, or makes an object of packed tensors, its sources are read raw, and it runs each
time they have been read.

It knows converters, headers and shapes. It refuses to know values, devices and budgets.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.compat.key_conversion import KeyConversion
from airstream.errors import CheckpointError
from airstream.layout.expansion import Expansion, Expansions, conversion_kind, expand, try_convert
from airstream.layout.moves import Moves, find_moves, spec_of_moves
from airstream.layout.pieces import TORCH_DTYPES, dtype_of, item_of, piece_of, plain_spec
from airstream.layout.tensors import RAW_PREFIX, Conversion, TensorSpec
from airstream.reporting.units import counted

__all__ = ["KnownConversions", "trace"]


@dataclass(frozen=True, slots=True)
class KnownConversions:
    """What is known of a model's conversions. Equal layers are run once: even a run on empty tensors takes time."""

    expansions: Expansions = field(default_factory=dict)
    moves: dict[Hashable, Moves] = field(default_factory=dict)


def trace(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    index: CheckpointIndex,
    targets: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.dtype],
    known: KnownConversions,
) -> list[TensorSpec]:
    """What one converter makes of `sources`: byte plans if it only moves rows, else specs that it has to make.

    It is run on row numbers, every row collapsed to a single one, which costs a thousandth of running it on weights.
    `known` is for all calls of one model, and gets what is found out.
    """
    stored = [index[key] for key, _ in sources]
    kind = _shape_of(targets, name), wanted[name]
    expansion = None
    if conversion.unpacks(sources[0][1]):
        if len(sources) == 1 and (passed := _passed_through(conversion, name, sources, stored[0], targets)) is not None:
            return [passed]
        if conversion.makes_object(sources[0][1]):
            _check_packed_shape(name, stored, targets)
            return [_object_of(conversion, name, sources, stored, wanted)]
    else:
        if not conversion.keeps_views:  # else numpy may be asked, which makes values
            expansion = expand(conversion, name, sources, stored, kind, known.expansions)
        specs = _specs_of_views(expansion, stored, targets, wanted) if expansion is not None else None
        specs = specs or _specs_of_numbers(conversion, name, sources, stored, expansion, targets, wanted, known)
        if specs is not None:
            return specs
    expansion = expansion or expand(conversion, name, sources, stored, kind, known.expansions)
    if expansion is None or any(_shape_of(targets, output) != shape for output, shape in expansion.shapes.items()):
        listed = ", ".join(f"{tensor.name!r} {list(tensor.shape)}" for tensor in stored[:3])
        raise CheckpointError(
            f"{stored[0].file}: the model's {name!r} {list(targets[name].shape)} cannot be made of the checkpoint's "
            f"{counted(len(stored), 'tensor')} ({listed}, ...): one of them is missing or has the wrong shape"
        )
    patterns, raw = _raw_specs(conversion, sources, stored, wanted[name])
    elements = sum(math.prod(shape) for shape in expansion.shapes.values())
    made_by = Conversion(name, patterns, raw, max(expansion.peak_bytes, conversion.scratch_bytes(elements)))
    return [
        TensorSpec(
            output, wanted[output], shape, (), made_by, expansion.origins[output].line_offset(stored, wanted[name])
        )
        for output, shape in expansion.shapes.items()
    ]


def _specs_of_views(
    expansion: Expansion,
    stored: Sequence[StoredTensor],
    targets: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.dtype],
) -> list[TensorSpec] | None:
    """Byte plans of results that are all sources, or runs of their elements, as they are; None if one is not."""
    specs = []
    for name, shape in expansion.shapes.items():
        origin = expansion.origins[name]
        if origin.source is None or not origin.is_run or _shape_of(targets, name) != shape:
            return None
        tensor, dtype = stored[origin.source], wanted[name]
        start, count = origin.start // dtype.itemsize, math.prod(shape)
        elements, item_bytes = item_of(tensor)
        if start % elements or count % elements:
            return None
        piece = piece_of(tensor, start // elements * item_bytes, count // elements * item_bytes, 0, dtype)
        specs.append(TensorSpec(name, dtype, shape, (piece,), line_offset=origin.line_offset(stored, dtype)))
    return specs


def _specs_of_numbers(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    stored: Sequence[StoredTensor],
    expansion: Expansion | None,
    targets: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.dtype],
    known: KnownConversions,
) -> list[TensorSpec] | None:
    """Byte plans, found by running the converter on row numbers; None if it did more than move rows.

    What was found out for one layer's many sources serves the others: the experts of a layer have millions of rows. One
    source has few, and how they move may depend on more than shapes: on the heads of just that layer, say.
    """
    width = _common_width(stored)
    if any(width % item_of(tensor)[0] for tensor in stored):  # a row is not made of blocks
        return None
    first = dtype_of(stored[0])
    kind = conversion_kind(name, sources, stored, (_shape_of(targets, name), wanted[name]))
    moves = {name: known.moves[kind]} if len(stored) > 1 and kind in known.moves else None
    if moves is None:
        outputs = try_convert(conversion, name, sources, _numbered(stored, width))
        if not outputs:
            return None
        dtypes = {key: conversion.source_dtype(None, first, wanted[key]) for key in outputs if key in wanted}
        shapes = {key: tuple(targets[key].shape) for key in outputs if key in targets}
        moves = find_moves(outputs, stored, width, shapes, dtypes)
        if moves is None:
            return _transposed_spec(outputs, stored, targets, wanted) if conversion.keeps_views else None
        if moves.keys() == {name}:
            known.moves[kind] = moves[name]
    specs = [
        spec_of_moves(key, found, stored, width, conversion.source_dtype(None, first, wanted[key]))
        for key, found in moves.items()
    ]
    origins = expansion.origins if expansion is not None else {}
    return [
        replace(spec, line_offset=origins[spec.name].line_offset(stored, spec.dtype)) if spec.name in origins else spec
        for spec in specs
    ]


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
    passed = (try_convert(conversion, name, sources, [numbers]) or {}).get(name)
    if passed is None or not torch.equal(passed.double(), numbers.double()):
        return None
    return plain_spec(name, stored, passed.dtype)


def _check_packed_shape(name: str, stored: Sequence[StoredTensor], targets: Mapping[str, torch.Tensor]) -> None:
    """Refuse packed numbers, one for each of the weight's, in another shape: a product would fail, unnamed."""
    expected = _shape_of(targets, name)
    for tensor in stored:
        if math.prod(tensor.shape) == math.prod(expected) > 1 and tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, the model's {name!r} needs "
                f"{list(expected)}: config.json and the weights do not belong together"
            )


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
        numbered.append(torch.arange(start, start + count, dtype=torch.long, device="cpu").view(shape))
        start += count
    return numbered


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
    if not torch.equal(ids.flatten(), torch.arange(count, dtype=torch.long, device="cpu")):
        return None
    piece = piece_of(tensor, 0, tensor.nbytes, 0, wanted[name])
    return [TensorSpec(name, wanted[name], shape, (piece,), line_offset=0, transposed=True)]
