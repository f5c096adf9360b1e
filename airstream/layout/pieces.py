"""This says which bytes of a stored tensor are read for which of a tensor of the model, and what is made of them.

It knows dtypes, blocks and rows. It refuses to know converters, and why rows change places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from airstream.checkpoint.stored import StoredTensor
from airstream.codecs.block_types import BlockType
from airstream.layout.tensors import CACHE_LINE_BYTES, TensorSpec
from airstream.transfer.piece import Cast, Piece

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


MAX_ITEM_BYTES = 8 << 20
"""Of rows that are dealt out together, once they are numbers: so much memory it takes a reader thread."""


def piece_of(stored: StoredTensor, start: int, nbytes: int, target: int, dtype: torch.dtype) -> Piece:
    """`nbytes` of `stored` from byte `start`, for a tensor of `dtype`, at its byte `target` (before a cast)."""
    if stored.block is None and TORCH_DTYPES[stored.dtype] == dtype:
        return Piece(stored.file, stored.offset + start, nbytes, target)
    elements, item_bytes = item_of(stored)
    cast = Cast(_source_of(stored), str(dtype).removeprefix("torch."), item_bytes, elements * dtype.itemsize)
    target = target // item_bytes * cast.target_item_bytes
    return Piece(stored.file, stored.offset + start, nbytes, target, cast)


def dealt_piece(stored: StoredTensor, width: int, rows: int, ways: int, dtype: torch.dtype) -> Piece | None:
    """All of `stored`, every `rows` rows of it dealt `ways` ways; None if so many are too much to be read at once."""
    elements, item_bytes = item_of(stored)
    source_bytes, target_bytes = rows * width // elements * item_bytes, rows * width * dtype.itemsize
    if target_bytes > MAX_ITEM_BYTES or source_bytes > MAX_ITEM_BYTES:
        return None
    cast = Cast(_source_of(stored), str(dtype).removeprefix("torch."), source_bytes, target_bytes)
    return Piece(stored.file, stored.offset, stored.nbytes, 0, replace(cast, rows=rows, ways=ways))


def _source_of(stored: StoredTensor) -> str | BlockType:
    """What a `Cast` is from."""
    return stored.block or str(TORCH_DTYPES[stored.dtype]).removeprefix("torch.")


def item_of(stored: StoredTensor) -> tuple[int, int]:
    """Elements and bytes of what a file cannot store less of: one number, or a block of them."""
    if stored.block is not None:
        return stored.block.elements, stored.block.nbytes
    return 1, TORCH_DTYPES[stored.dtype].itemsize


def dtype_of(stored: StoredTensor) -> torch.dtype:
    """The dtype of its numbers, unpacked."""
    return TORCH_DTYPES[stored.dtype] if stored.block is None else getattr(torch, stored.block.dtype)


def plain_spec(name: str, stored: StoredTensor, dtype: torch.dtype) -> TensorSpec:
    """`stored` as it lies, cast to `dtype`."""
    piece = piece_of(stored, 0, stored.nbytes, 0, dtype)
    line_offset = stored.resident_offset if dtype_of(stored) == dtype else 0
    return TensorSpec(name, dtype, stored.shape, (piece,), line_offset=line_offset and line_offset % CACHE_LINE_BYTES)
