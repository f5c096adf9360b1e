"""What is known of one tensor of a model before it is read: its name, type and shape, and the bytes it is made of.

Knows nothing of how that was found out, of devices, or of where in memory the tensor is going to lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from airstream.checkpoint.index import StoredTensor
from airstream.checkpoint.reader import Cast, Piece
from airstream.codecs import BLOCK_TYPES

RAW_PREFIX = "raw:"
"""Before the names of raw tensors: a converted tensor may be called like the one it is made of."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter or buffer of the model, and the pieces of the checkpoint it is made of.

    Attributes:
        pieces: their `target` counts from the first byte of this tensor. Empty if `made_by` makes it.
        moved: a converter of transformers put it together, or it was not mapped to begin with, so that a resident model
            has it in memory of its own.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    made_by: Conversion | None = None
    moved: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """What is read for it: itself, or what it is made of."""
        return self.made_by.sources if self.made_by is not None else (self,)


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converter of transformers that has to see values, to be run on raw tensors after they have been read.

    Attributes:
        name: the name it is looked up by.
        patterns: for each source, the pattern by which transformers knows it.
        sources: the raw tensors, named by their checkpoint keys behind `RAW_PREFIX`.
        scratch_bytes: that it, or computing with what it makes, takes besides for a moment.
        growth_bytes: that computing with it adds for as long as it is in its module.
        is_object: it makes an object of views of its sources, which takes their place: nothing is copied, and the
            object lasts as long as its sources lie in the same place.
    """

    name: str
    patterns: tuple[str, ...]
    sources: tuple[TensorSpec, ...]
    scratch_bytes: int = 0
    growth_bytes: int = 0
    is_object: bool = False

    @property
    def nbytes(self) -> int:
        """Of the sources."""
        return sum(source.nbytes for source in self.sources)


def plain_spec(name: str, stored: StoredTensor, dtype: torch.dtype) -> TensorSpec:
    """`stored` as it lies, cast to `dtype`."""
    piece = piece_of(stored, 0, stored.nbytes, 0, dtype)
    return TensorSpec(name, dtype, stored.shape, (piece,), moved=not stored.is_mapped)


def piece_of(stored: StoredTensor, start: int, nbytes: int, target: int, dtype: torch.dtype) -> Piece:
    """`nbytes` of `stored` from byte `start`, for a tensor of `dtype`, at its byte `target` (before a cast)."""
    if TORCH_DTYPES.get(stored.dtype) == dtype:
        return Piece(stored.file, stored.offset + start, nbytes, target)
    elements, item_bytes = item_of(stored.dtype)
    source = stored.dtype if stored.dtype in BLOCK_TYPES else str(TORCH_DTYPES[stored.dtype]).removeprefix("torch.")
    cast = Cast(source, str(dtype).removeprefix("torch."), item_bytes, elements * dtype.itemsize)
    target = target // item_bytes * cast.target_item_bytes
    return Piece(stored.file, stored.offset + start, nbytes, target, cast)


def item_of(stored: str) -> tuple[int, int]:
    """Elements and bytes of what a file cannot store less of: one number, or a block of them."""
    if stored in BLOCK_TYPES:
        return BLOCK_TYPES[stored].elements, BLOCK_TYPES[stored].nbytes
    return 1, TORCH_DTYPES[stored].itemsize


def dtype_of(stored: StoredTensor) -> torch.dtype:
    """The dtype of its numbers; blocks become float32 before they are rounded to anything else."""
    return TORCH_DTYPES.get(stored.dtype, torch.float32)
