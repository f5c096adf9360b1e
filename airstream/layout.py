"""Which bytes of which file make which tensor of the model.

A `TensorSpec` is the byte plan of one tensor: the pieces of files it consists of. Most tensors are one piece. Where
transformers merges, splits or reorders checkpoint tensors while loading (all experts of a layer into one tensor, say),
its own converters are run once on tensors of row numbers: what comes out says which row of which source lies where,
so that at run time there is nothing left to do but read. Where a converter does more than move rows (it transposes, or
computes), its sources are read raw and it runs on them each time: a `Conversion`.

Knows nothing of devices, budgets or the order of execution.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from airstream.checkpoint.index import CheckpointIndex, StoredTensor
from airstream.checkpoint.reader import Piece
from airstream.compat import DtypePlan, KeyConversion, conversion_for, may_be_missing, natural_order, tied_names
from airstream.errors import CheckpointError
from airstream.pieces import TORCH_DTYPES as TORCH_DTYPES
from airstream.pieces import dealt_piece, dtype_of, item_of, piece_of
from airstream.row_numbers import dealt, is_permutation, runs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RAW_PREFIX = "raw:"
"""Before the names of raw tensors: a converted tensor may be called like the one it is made of."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter or buffer of the model, and the pieces of the checkpoint it is made of.

    Attributes:
        pieces: their `target` counts from the first byte of this tensor. Empty if `made_by` makes it.
        moved: a converter of transformers put it together, so that a resident model has it in memory of its own.
        transposed: it lies in memory with rows and columns exchanged, as the resident one, of shape (columns, rows).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    made_by: Conversion | None = None
    moved: bool = False
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converter of transformers that has to see values, to be run on raw tensors after they have been read.

    Attributes:
        name: the name it is looked up by.
        patterns: for each source, the pattern by which transformers knows it.
        sources: the raw tensors, named by their checkpoint keys behind `RAW_PREFIX`.
    """

    name: str
    patterns: tuple[str, ...]
    sources: tuple[TensorSpec, ...]


def read_specs(model: PreTrainedModel, index: CheckpointIndex, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The byte plan of every tensor of `model` that the checkpoint provides, tied names included.

    Args:
        model: on the meta device.
        dtype: what floating-point parameters are to be, as `from_pretrained(dtype=...)`.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the model.
    """
    targets = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    dtype_plan = DtypePlan(model, dtype)
    wanted = {name: dtype_plan(name, tensor.dtype) for name, tensor in targets.items()}
    specs: dict[str, TensorSpec] = {}
    conversion = conversion_for(model, index)
    converted: dict[str, list[tuple[str, str]]] = {}
    for key in natural_order(index):
        name, pattern = conversion.rename(key)
        if name not in targets:
            continue  # weights of parts that this class does not have (a multi-token-prediction head, say)
        if pattern is None:
            stored = index[key]
            _check_shape(name, stored.shape, tuple(targets[name].shape), key)
            piece = piece_of(stored, 0, stored.nbytes, 0, wanted[name])
            specs[name] = TensorSpec(name, wanted[name], stored.shape, (piece,), moved=conversion.copies)
        else:
            converted.setdefault(name, []).append((key, pattern))
    for name, sources in converted.items():
        for spec in _trace(conversion, name, sources, index, targets, wanted):
            specs[spec.name] = spec
    _resolve_ties(model, specs, targets)
    _check_complete(model, specs, targets)
    return specs


def _check_shape(name: str, stored: Sequence[int], expected: Sequence[int], key: str) -> None:
    if tuple(stored) != tuple(expected):
        raise CheckpointError(
            f"tensor {key!r} has shape {list(stored)}, the model's {name!r} needs {list(expected)}: "
            "config.json and the weights do not belong together"
        )


def _trace(
    conversion: KeyConversion,
    name: str,
    sources: Sequence[tuple[str, str]],
    index: CheckpointIndex,
    targets: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.dtype],
) -> list[TensorSpec]:
    """What one converter makes of `sources`: byte plans if it only moves rows, else specs that it has to make.

    It is run on row numbers, every row collapsed to a single one, which costs a thousandth of running it on weights.
    """
    stored = [index[key] for key, _ in sources]
    width = _common_width(stored)
    whole = all(width % item_of(tensor.dtype)[0] == 0 for tensor in stored)  # else a row is not made of blocks
    outputs = _try_convert(conversion, name, sources, _numbered(stored, width)) if whole else None
    if outputs is not None:
        specs = _specs_of_rows(outputs, stored, width, targets, wanted)
        if specs is None and conversion.copies:
            specs = _transposed_spec(outputs, stored, targets, wanted)
        if specs is not None:
            return specs
    shapes = [torch.empty(tensor.shape, dtype=dtype_of(tensor), device="meta") for tensor in stored]
    outputs = _try_convert(conversion, name, sources, shapes)
    if outputs is None or any(_shape_of(targets, output) != tuple(outputs[output].shape) for output in outputs):
        listed = ", ".join(f"{tensor.name!r} {list(tensor.shape)}" for tensor in stored[:3])
        raise CheckpointError(
            f"the model's {name!r} {list(targets[name].shape)} cannot be made of the checkpoint's {len(stored)} "
            f"tensors ({listed}, ...): one of them is missing or has the wrong shape"
        )
    raw = tuple(_raw_spec(tensor, conversion.source_dtype(dtype_of(tensor), wanted[name])) for tensor in stored)
    made_by = Conversion(name, tuple(pattern for _, pattern in sources), raw)
    return [TensorSpec(output, wanted[output], _shape_of(targets, output), (), made_by) for output in outputs]


def _try_convert(
    conversion: KeyConversion, name: str, sources: Sequence[tuple[str, str]], tensors: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    try:
        return conversion.convert(name, [(*source, tensor) for source, tensor in zip(sources, tensors, strict=True)])
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError):
        return None  # it needs real shapes or values, or a source is missing: the caller finds out which


def _shape_of(targets: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    return tuple(targets[name].shape) if name in targets else ()


def _raw_spec(stored: StoredTensor, dtype: torch.dtype) -> TensorSpec:
    """`stored` as the converters of transformers get it: in its own shape, already cast."""
    return TensorSpec(RAW_PREFIX + stored.name, dtype, stored.shape, (piece_of(stored, 0, stored.nbytes, 0, dtype),))


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


def _specs_of_rows(
    outputs: Mapping[str, torch.Tensor],
    stored: Sequence[StoredTensor],
    width: int,
    targets: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.dtype],
) -> list[TensorSpec] | None:
    """Byte plans from what a converter made of numbered tensors; None if it did more than move rows."""
    counts = [math.prod(tensor.shape) // width for tensor in stored]
    starts = [0, *itertools.accumulate(counts[:-1])]
    everything = torch.cat([ids.reshape(-1) for ids in outputs.values()])
    if not is_permutation(everything, sum(counts)):
        return None
    begins = torch.zeros(sum(counts) + 1, dtype=torch.bool)  # one more: an empty source may be the last
    begins[starts] = True
    specs = []
    for name, ids in outputs.items():
        shape = (*ids.shape[:-1], width) if width > 1 else tuple(ids.shape)
        if name not in targets or tuple(targets[name].shape) != tuple(shape) or (width > 1 and ids.shape[-1] != 1):
            return None
        deal = dealt(ids.reshape(-1)) if len(stored) == 1 else None
        if deal is not None and (piece := dealt_piece(stored[0], width, *deal, wanted[name])):
            specs.append(TensorSpec(name, wanted[name], tuple(shape), (piece,), moved=True))
            continue
        pieces = []
        for begin, first, count in runs(ids.reshape(-1), begins):
            number = bisect.bisect_right(starts, first) - 1
            elements, item_bytes = item_of(stored[number].dtype)
            row_bytes = width // elements * item_bytes
            start = (first - starts[number]) * row_bytes
            pieces.append(piece_of(stored[number], start, count * row_bytes, begin * row_bytes, wanted[name]))
        specs.append(TensorSpec(name, wanted[name], tuple(shape), tuple(pieces), moved=True))
    return specs


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


def _resolve_ties(model: PreTrainedModel, specs: dict[str, TensorSpec], targets: Mapping[str, torch.Tensor]) -> None:
    """Give a name without weights of its own the bytes of the name it is tied to, whichever of the two is stored."""
    groups: dict[str, list[str]] = {}
    for name, source in tied_names(model).items():
        groups.setdefault(source, [source]).append(name)
    for names in groups.values():
        present = next((specs[name] for name in names if name in specs), None)
        for name in names:
            if present is not None and name not in specs and name in targets:
                specs[name] = replace(present, name=name)


def _check_complete(
    model: PreTrainedModel, specs: Mapping[str, TensorSpec], targets: Mapping[str, torch.Tensor]
) -> None:
    optional = [re.compile(pattern) for pattern in may_be_missing(model)]
    missing = [name for name in targets if name not in specs and not any(p.search(name) for p in optional)]
    if missing:
        names = ", ".join(repr(name) for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of the {len(targets)} tensors of {type(model).__name__}: {names}. "
            "Download it again, or check that config.json belongs to it"
        )
