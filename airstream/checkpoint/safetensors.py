"""This says which tensor lies where: the headers of a safetensors checkpoint are read and checked first.

It knows the safetensors format (https://huggingface.co/docs/safetensors/index#format: a little-endian u64 with the size
of a JSON header, the header, then the data) and the sharded layout of the hub. It reads headers only: never a weight.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airstream.checkpoint.names import SHARD_INDEX, SINGLE_FILE, file_name
from airstream.checkpoint.packed_tensors import unfold
from airstream.checkpoint.shard_index import read_weight_map
from airstream.checkpoint.stored import ITEM_BYTES, CheckpointIndex, StoredTensor
from airstream.checkpoint.weight_files import no_checkpoint
from airstream.errors import CheckpointError
from airstream.reporting.units import counted, format_bytes
from airstream.system.foreign_files import open_regular
from airstream.system.foreign_json import HEADER, parse_json
from airstream.system.impostors import HEAD_BYTES, complaint

MAX_HEADER_BYTES = HEADER.max_bytes
"""Of text. The safetensors library reads up to 100 MB, which no checkpoint has: 45,000 tensors take 6."""

MAX_NAME_CHARACTERS = 4096
MAX_DIMENSIONS = 64
"""torch's own limit."""


def open_safetensors(folder: Path, variant: str | None = None) -> CheckpointIndex:
    """Read and check every header of the safetensors checkpoint in `folder`; `formats` knows the other formats.

    Args:
        variant: what stands before the ending of its files' names.

    Raises:
        CheckpointNotFoundError: no checkpoint, or a shard that the index names is missing.
        CheckpointError: a file is truncated or its header is not what safetensors writes; nothing was loaded.
    """
    expected = _weight_map(folder, variant)
    tensors: dict[str, StoredTensor] = {}
    for file in _checkpoint_files(folder, expected, variant):
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
    return CheckpointIndex(tensors)


def has_weights(folder: Path, variant: str | None = None) -> bool:
    """Whether `folder` has the files of a checkpoint, complete by name. Opens no file of weights.

    Raises:
        CheckpointError: the shard index is not one.
    """
    expected = _weight_map(folder, variant)
    anything = list(folder.glob(file_name("*.safetensors", variant)))
    files = _checkpoint_files(folder, expected, variant) if expected is not None else anything
    return bool(files) and all(file.is_file() for file in files)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in file order, with every claim of its header checked against the file."""
    header, data_start, file_bytes = _load_header(file)
    tensors = [
        _stored_tensor(file, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.end))
    tensors = unfold(file, tensors, _metadata(file, header))
    end, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.offset < end:
            raise CheckpointError(f"{file}: tensor {tensor.name!r} overlaps {previous}: the file is corrupt")
        end, previous = tensor.end, tensor.name
    if end > file_bytes:
        raise CheckpointError(
            f"{file} is truncated: its header describes {counted(end, 'byte')} ({format_bytes(end)}), the file has "
            f"{file_bytes:,}. Download it again"
        )
    return tensors


def _load_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data starts, and the size of the file."""
    with open_regular(file) as stream:
        try:
            file_bytes = os.fstat(stream.fileno()).st_size
            head = stream.read(HEAD_BYTES)
            _check_head(file, head, file_bytes)
            header_bytes = int.from_bytes(head[:8], "little")
            stream.seek(8)
            raw = stream.read(header_bytes)
        except OSError as error:
            raise CheckpointError(f"shard {file} cannot be read: {error.strerror}") from error
    try:
        header = parse_json(raw, HEADER, unique=True)
    except ValueError as error:
        said = complaint(file, head, "safetensors")
        raise CheckpointError(said or f"{file}: the header is not sound: {error}. Download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a table of tensors")
    return header, 8 + header_bytes, file_bytes


def _metadata(file: Path, header: Mapping[str, Any]) -> Mapping[str, str]:
    """What the header says of the file, which safetensors itself reads too: texts."""
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: __metadata__ in the header is no table of texts. Download it again")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{file}: {key[:80]!r} in the header's __metadata__ is {str(value)[:40]}, not a text. Download it again"
            )
    return metadata


def _check_head(file: Path, head: bytes, file_bytes: int) -> None:
    """Refuse a file that does not begin as safetensors do."""
    (header_bytes,) = struct.unpack("<Q", head[:8]) if len(head) >= 8 else (0,)
    if 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
        return
    if said := complaint(file, head, "safetensors"):
        raise CheckpointError(said)
    if MAX_HEADER_BYTES < header_bytes <= file_bytes - 8:
        raise CheckpointError(
            f"{file}: its header claims {counted(header_bytes, 'byte')}, more than the {MAX_HEADER_BYTES:,} that any "
            "checkpoint needs. If it is sound, save it in several files"
        )
    raise CheckpointError(
        f"{file} is not a complete safetensors file: its header claims {counted(header_bytes, 'byte')}, "
        f"the file has {file_bytes:,}. Download it again"
    )


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if len(name) > MAX_NAME_CHARACTERS:
        raise CheckpointError(f"{file}: the name of tensor {name[:80]!r}... has {counted(len(name), 'character')}")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"it has {counted(len(shape), 'dimension')}")
        if dtype not in ITEM_BYTES:
            raise ValueError(f"its type is {str(dtype)[:40]!r}")
        item_bytes = ITEM_BYTES[dtype]
        if not all(type(value) is int and 0 <= value < 1 << 63 for value in (*shape, begin, end)):
            raise ValueError("sizes and offsets must be non-negative integers of 64 bits")
        if math.prod(shape) * item_bytes != end - begin:
            raise ValueError(f"{dtype} {shape} does not take {counted(end - begin, 'byte')}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header's entry of tensor {name!r} is malformed ({error!r})") from None
    return StoredTensor(name, file, data_start + begin, end - begin, dtype, tuple(shape))


def _weight_map(folder: Path, variant: str | None) -> dict[str, str] | None:
    """Tensor name -> shard, as the index file says; None for a checkpoint without one."""
    index = folder / file_name(SHARD_INDEX, variant)
    if (folder / file_name(SINGLE_FILE, variant)).is_file() or not index.is_file():
        return None
    return read_weight_map(index)


def _checkpoint_files(folder: Path, weight_map: Mapping[str, str] | None, variant: str | None) -> list[Path]:
    if weight_map is not None:
        return [folder / shard for shard in sorted(set(weight_map.values()))]
    single = folder / file_name(SINGLE_FILE, variant)
    if single.is_file():
        return [single]
    files = sorted(folder.glob(file_name("*.safetensors", variant)))
    if files:
        return files
    raise no_checkpoint(folder, variant)
