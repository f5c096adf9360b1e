"""Some tensors are not one range of a file: this copies them, once, into a safetensors file in the cache folder.

It knows strided views and byte order. Only what cannot be read in place is copied, one tensor at a time, so that host
memory holds the largest of them twice at most. It refuses to know what pickles say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from airstream.checkpoint.pickles.tensors import ScatteredTensor
from airstream.checkpoint.safetensors import read_header
from airstream.checkpoint.safetensors_writer import header_bytes
from airstream.checkpoint.stored import ITEM_BYTES, StoredTensor
from airstream.errors import CheckpointError
from airstream.system.cache import cache_folder, make_once

GATHERED_FILE = "gathered.safetensors"
VERSION = 1
"""Raise it when something else is written: older folders in caches are then made again."""

_HEADER_ROOM = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather(tensors: Sequence[ScatteredTensor], progress: bool = True) -> list[StoredTensor]:
    """`tensors` as they are wanted, contiguous and little-endian, in a file of the cache. Blocks while that is made.

    Raises:
        DiskSpaceError: the disk of the cache folder is too full.
    """
    recipe = _recipe(tensors)
    folder = cache_folder() / "gathered" / hashlib.sha256(recipe.encode()).hexdigest()[:32]
    size = sum(_nbytes(tensor) for tensor in tensors) + _HEADER_ROOM

    def build(made: Path, _: Path) -> None:
        _write(made / GATHERED_FILE, tensors, progress)

    return read_header(make_once(folder, recipe, build, size) / GATHERED_FILE)


def _recipe(tensors: Sequence[ScatteredTensor]) -> str:
    """What the result depends on: the tensors, and files as they are now."""
    files = {tensor.file.resolve(): tensor.file.stat() for tensor in tensors}
    lines = [f"gather {VERSION}"]
    lines += [f"{file} {status.st_size} {status.st_mtime_ns}" for file, status in sorted(files.items())]
    lines += [f"{t.name} {t.file.name} {t.offset} {t.dtype} {t.shape} {t.stride} {t.is_big_endian}" for t in tensors]
    return "\n".join(lines)


def _write(file: Path, tensors: Sequence[ScatteredTensor], progress: bool) -> None:
    from tqdm import tqdm

    total = sum(_nbytes(tensor) for tensor in tensors)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="rearranging", disable=None if progress else True)
    with bar, file.open("wb") as out:
        out.write(header_bytes((t.name, t.dtype, t.shape, _nbytes(t)) for t in _widest_first(tensors)))
        for tensor in _widest_first(tensors):
            out.write(_contiguous(tensor))
            bar.update(_nbytes(tensor))


def _widest_first(tensors: Sequence[ScatteredTensor]) -> list[ScatteredTensor]:
    """In an order that keeps every element on a multiple of its size."""
    return sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])


def _contiguous(tensor: ScatteredTensor) -> bytearray:
    """The bytes of the elements in order."""
    raw, ordered = bytearray(tensor.nbytes), bytearray(_nbytes(tensor))
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        if stream.readinto(raw) != tensor.nbytes:
            raise CheckpointError(f"{tensor.file} ends within tensor {tensor.name!r}. Download it again")
    integers = _INTEGERS[ITEM_BYTES[tensor.dtype]]
    strided = torch.frombuffer(raw, dtype=integers).as_strided(tensor.shape, tensor.stride)
    torch.frombuffer(ordered, dtype=integers).view(tensor.shape).copy_(strided)
    if tensor.is_big_endian:
        elements = torch.frombuffer(ordered, dtype=torch.uint8).view(-1, _turned_bytes(tensor.dtype))
        elements.copy_(elements.flip(1))
    return ordered


def _turned_bytes(dtype: str) -> int:
    """How many bytes are one number: a complex element is two."""
    return ITEM_BYTES[dtype] // (2 if dtype == "C64" else 1)


def _nbytes(tensor: ScatteredTensor) -> int:
    count = ITEM_BYTES[tensor.dtype]
    for size in tensor.shape:
        count *= size
    return count
