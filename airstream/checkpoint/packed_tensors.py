"""This says which tensors of a safetensors file are packed without loss: its own metadata does, under one key.

The value is JSON, an object for each tensor of the file: `line` is where within a cache line the tensor began in the
file that it was packed from. Of a packed one there is `codec`, the `shape` of its numbers and the `elements` of a block
besides; its entry in the header is then of type U8, of shape (blocks, bytes of a block). docs/formats.md has all of it.

It knows that key. It refuses to know how a block is decoded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from airstream.checkpoint.safetensors_writer import METADATA, header_bytes
from airstream.checkpoint.stored import ITEM_BYTES, StoredTensor
from airstream.codecs.lossless_blocks import lossless_block
from airstream.errors import CheckpointError
from airstream.reporting.units import round_up
from airstream.system.foreign_json import HEADER, parse_json
from airstream.transfer.files import PAGE_BYTES

__all__ = ["KEY", "LINE_BYTES", "describe", "header_room", "line_of", "packed_header", "unfold"]

KEY = "airstream.packed"
"""In the metadata of a file's header."""

LINE_BYTES = 64
"""Of a cache line. Kernels add up in another order for numbers that begin at another place within one."""

MAX_DIMENSIONS = 64


def line_of(tensor: StoredTensor) -> int:
    """Where within a cache line a resident model of the checkpoint that `tensor` is packed from has it.

    Where no number may begin, a model that streams that checkpoint has none either: it begins with a line.
    """
    mapped = tensor.offset if tensor.resident_offset is None else tensor.resident_offset
    return 0 if mapped % ITEM_BYTES.get(tensor.dtype, 1) else mapped % LINE_BYTES


def describe(tensors: Iterable[StoredTensor]) -> str:
    """The value of the key for `tensors`, which are as they will be read."""
    return json.dumps({tensor.name: _entry(tensor) for tensor in tensors}, separators=(",", ":"))


def _entry(tensor: StoredTensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"line": tensor.resident_offset or 0}
    if tensor.block is not None:
        entry |= {"codec": tensor.block.name, "shape": tensor.shape, "elements": tensor.block.elements}
    return entry


def header_room(tensors: Sequence[StoredTensor]) -> int:
    """The bytes that precede `tensors`, packed, in their file: its header has no more, whatever they pack to."""
    more = sum(128 + 24 * len(tensor.shape) for tensor in tensors)
    return round_up(len(packed_header(tensors)) + more, PAGE_BYTES)


def packed_header(tensors: Sequence[StoredTensor], room: int = 0) -> bytes:
    """What precedes `tensors`, which may be packed: `room` bytes, or as many as it takes."""
    entries = ((tensor.name, *_in_header(tensor), tensor.nbytes) for tensor in tensors)
    is_packed = any(tensor.resident_offset is not None for tensor in tensors)
    return header_bytes(entries, {**METADATA, KEY: describe(tensors)} if is_packed else METADATA, room)


def _in_header(tensor: StoredTensor) -> tuple[str, tuple[int, ...]]:
    """Type and shape in the header."""
    if tensor.block is None:
        return tensor.dtype, tensor.shape
    return "U8", (tensor.nbytes // tensor.block.nbytes, tensor.block.nbytes)


def unfold(file: Path, tensors: Iterable[StoredTensor], metadata: Any) -> list[StoredTensor]:
    """`tensors` of `file` as what they are packed from, in the same order, by the `metadata` of its header.

    Raises:
        CheckpointError: that is not what it says.
    """
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if text is None:
        return list(tensors)
    try:
        entries = parse_json(str(text).encode(), HEADER, unique=True)
        if not isinstance(entries, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise CheckpointError(f"{file}: {KEY} in the metadata is not sound: {error}. Repack it again") from None
    return [_unfolded(file, tensor, entries[tensor.name]) if tensor.name in entries else tensor for tensor in tensors]


def _unfolded(file: Path, tensor: StoredTensor, entry: Any) -> StoredTensor:
    try:
        line = _number(entry, "line", LINE_BYTES)
        if "codec" not in entry:
            return replace(tensor, resident_offset=line)
        return _packed(tensor, entry, line)
    except (KeyError, TypeError, ValueError, CheckpointError) as error:
        said = error if isinstance(error, CheckpointError) else repr(error)
        raise CheckpointError(
            f"{file}: what {KEY} in the metadata says of tensor {tensor.name!r} is malformed ({said}). Repack it again"
        ) from None


def _packed(tensor: StoredTensor, entry: Mapping[str, Any], line: int) -> StoredTensor:
    shape = entry["shape"]
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise ValueError("its shape is no list of sizes")
    if not all(type(size) is int and 0 < size < 1 << 63 for size in shape):
        raise ValueError("its shape is not made of positive integers")
    if tensor.dtype != "U8" or len(tensor.shape) != 2:
        raise ValueError(f"it is stored as {tensor.dtype} {list(tensor.shape)}, not as blocks of bytes")
    count, nbytes = tensor.shape
    block = lossless_block(str(entry["codec"])[:40], _number(entry, "elements", 1 << 20), nbytes)
    if math.prod(shape) != count * block.elements or shape[-1] % block.elements:
        raise ValueError(f"{count} blocks of {block.elements} numbers are not {shape}, or rows are not whole blocks")
    return replace(tensor, dtype="BF16", shape=tuple(shape), resident_offset=line, block=block)


def _number(entry: Mapping[str, Any], key: str, limit: int) -> int:
    value = entry[key]
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError(f"{key} is {str(value)[:40]}")
    return value
