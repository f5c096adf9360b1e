"""Which tensor lies where: the headers of a safetensors checkpoint, read and checked before anything else happens.

Knows the safetensors format (https://huggingface.co/docs/safetensors/index#format: a little-endian u64 with the size
of a JSON header, the header, then the data) and the sharded layout of the hub. Reads headers only: never a weight.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airstream.errors import CheckpointError, CheckpointNotFoundError
from airstream.units import format_bytes

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself: a larger header is refused as hostile."""

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors' names of the types."""

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: `nbytes` bytes at `offset` of `file`, row-major, little-endian.

    Attributes:
        resident_offset: where in memory of its own a resident model has it, in bytes. None if it maps the file.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    resident_offset: int | None = None

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class CheckpointIndex(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint by name, and the files they lie in."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = dict(tensors)
        self.files: tuple[Path, ...] = tuple(sorted({tensor.file for tensor in tensors.values()}))
        self.nbytes: int = sum(tensor.nbytes for tensor in tensors.values())

    @classmethod
    def open(cls, folder: Path) -> CheckpointIndex:
        """Read and check every header of the safetensors checkpoint in `folder`; `formats` knows the other formats.

        Raises:
            CheckpointNotFoundError: no checkpoint, or a shard that the index names is missing.
            CheckpointError: a file is truncated or its header is not what safetensors writes; nothing was loaded.
        """
        expected = _weight_map(folder)
        tensors: dict[str, StoredTensor] = {}
        for file in _checkpoint_files(folder, expected):
            for tensor in read_header(file):
                if tensor.name in tensors and (expected is None or expected.get(tensor.name) != file.name):
                    if expected is None:
                        other = tensors[tensor.name].file.name
                        raise CheckpointError(
                            f"tensor {tensor.name!r} is in two files, {other} and {file.name}: remove one"
                        )
                    continue
                tensors[tensor.name] = tensor
        for name, shard in (expected or {}).items():
            if name not in tensors:
                raise CheckpointError(
                    f"{folder / shard}: tensor {name!r} is missing, though {SHARD_INDEX} places it there. "
                    "Download the checkpoint again"
                )
        return cls(tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def has_weights(folder: Path) -> bool:
    """Whether `folder` has the files of a checkpoint, complete by name. Opens no file of weights.

    Raises:
        CheckpointError: the shard index is not one.
    """
    expected = _weight_map(folder)
    files = _checkpoint_files(folder, expected) if expected is not None else list(folder.glob("*.safetensors"))
    return bool(files) and all(file.is_file() for file in files)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in file order, with every claim of its header checked against the file."""
    header, data_start, file_bytes = _load_header(file)
    tensors = [
        _stored_tensor(file, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.end))
    end, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.offset < end:
            raise CheckpointError(f"{file}: tensor {tensor.name!r} overlaps {previous}: the file is corrupt")
        end, previous = tensor.end, tensor.name
    if end > file_bytes:
        raise CheckpointError(
            f"{file} is truncated: its header describes {end:,} bytes ({format_bytes(end)}), the file has "
            f"{file_bytes:,}. Download it again"
        )
    return tensors


def _load_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data starts, and the size of the file."""
    try:
        with file.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            (header_bytes,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{file} is not a complete safetensors file: its header claims {header_bytes:,} bytes, "
                    f"the file has {file_bytes:,}. Download it again"
                )
            raw = stream.read(header_bytes)
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"shard {file} is missing. Download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"shard {file} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not JSON ({error}). Download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a table of tensors")
    return header, 8 + header_bytes, file_bytes


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        item_bytes = ITEM_BYTES[dtype]
        if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
            raise ValueError("sizes and offsets must be non-negative integers")
        if math.prod(shape) * item_bytes != end - begin:
            raise ValueError(f"{dtype} {shape} does not take {end - begin} bytes")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header's entry of tensor {name!r} is malformed ({error!r})") from None
    return StoredTensor(name, file, data_start + begin, end - begin, dtype, tuple(shape))


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard, as the index file says; None for a checkpoint without one."""
    index = folder / SHARD_INDEX
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return None
    return read_weight_map(index)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, as the index file `index` says. Shards lie beside it: whatever else it names is refused.

    Raises:
        CheckpointError: it is not an index, or names something outside its folder.
    """
    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=without_duplicates)["weight_map"]
        shards = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a shard index ({error!r}). Download it again") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", "..") or set("\\\0") & set(shard):
            raise CheckpointError(f"{index} names the shard {shard!r}: shards must lie beside the index")
    return dict(weight_map)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if a key is there twice: readers disagree on which of them counts."""
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def _checkpoint_files(folder: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    if weight_map is not None:
        return [folder / shard for shard in sorted(set(weight_map.values()))]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    raise CheckpointNotFoundError(
        f"{folder} has no checkpoint: expected {SINGLE_FILE}, {SHARD_INDEX} or pytorch_model.bin"
    )
