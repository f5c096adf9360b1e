"""This says where in pickled checkpoints (`pytorch_model.bin`, `*.pth`) each tensor lies, so that it is read in place.

`torch.save` keeps every storage as it is: in a zip archive since torch 1.6, before that one behind the other at the end
of the file. A tensor is a view of a storage, and nearly always a contiguous one: then its bytes are a range of the
file, and it is streamed like any other. What is not (a transposed weight, big-endian numbers) is described as
`ScatteredTensor`, for `gather` to bring together. Only headers are read, and nothing in the file is executed.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from airstream.checkpoint.pickles.archive import Record, read_records
from airstream.checkpoint.pickles.described import PickledStorage, PickledTensor
from airstream.checkpoint.pickles.unpickle import MAX_PICKLE_BYTES, SMALL_WORK, unpickle
from airstream.checkpoint.stored import ITEM_BYTES, StoredTensor
from airstream.errors import CheckpointError
from airstream.reporting.units import counted
from airstream.system.foreign_files import open_regular
from airstream.system.impostors import HEAD_BYTES, complaint

ZIP_SIGNATURE = b"PK\x03\x04"
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""What files of before torch 1.6 begin with, pickled."""

PROTOCOL_VERSION = 1001

WRAPPINGS = ("state_dict", "model", "model_state_dict", "module")
"""What training programs call the weights when they save other things beside them."""


@dataclass(frozen=True, slots=True)
class ScatteredTensor:
    """A tensor whose bytes do not lie as they are needed: a strided view of `nbytes` bytes at `offset` of `file`.

    Attributes:
        stride: in elements, from its first element, which is the one at `offset`.
        is_big_endian: the bytes of every element have to be turned round.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_big_endian: bool


def read_pickle(file: Path) -> tuple[list[StoredTensor], list[ScatteredTensor]]:
    """The tensors of a pickled checkpoint: those that can be read in place, and the others.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint, not complete, or refers to code. Nothing was executed.
    """
    with open_regular(file) as stream:
        try:
            head = stream.read(HEAD_BYTES)
            if said := complaint(file, head, "pickle"):
                raise CheckpointError(said)
            stream.seek(0)
            contents = (_read_archive if head.startswith(ZIP_SIGNATURE) else _read_legacy)(stream, file)
        except OSError as error:
            raise CheckpointError(f"shard {file} cannot be read: {error.strerror}") from error
    stored: list[StoredTensor] = []
    scattered: list[ScatteredTensor] = []
    for name, tensor in _weights(contents.pickled, file):
        placed = _place(name, tensor, contents, file)
        if isinstance(placed, StoredTensor):
            stored.append(placed)
        else:
            scattered.append(placed)
    return stored, scattered


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a file holds: the object, and its storages by key.

    Attributes:
        is_mapped: torch maps the storages from the file, rather than reading them into memory of their own.
    """

    pickled: Any
    storages: Mapping[str, Record]
    is_big_endian: bool
    is_mapped: bool


def _read_archive(stream: BinaryIO, file: Path) -> _Contents:
    records = read_records(stream, file)
    described = records["data.pkl"]
    if described.nbytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{file}: its data.pkl has {counted(described.nbytes, 'byte')}, more than any list of tensors"
        )
    order = records.get("byteorder")
    is_big_endian = False
    if order is not None:
        stream.seek(order.offset)
        is_big_endian = stream.read(min(order.nbytes, 6)) == b"big"
    stream.seek(described.offset)
    pickled = unpickle(stream, file)
    storages = {name.removeprefix("data/"): record for name, record in records.items() if name.startswith("data/")}
    return _Contents(pickled, storages, is_big_endian, is_mapped=True)


def _read_legacy(stream: BinaryIO, file: Path) -> _Contents:
    """Five pickles one behind the other: magic number, version, system, object, keys of the storages; then these."""
    if stream.read(1) != pickle.PROTO:
        raise CheckpointError(f"{file} is not a checkpoint that torch.save has written. Download it again")
    stream.seek(0)
    for expected in (MAGIC_NUMBER, PROTOCOL_VERSION):
        number = unpickle(stream, file, max_work=SMALL_WORK)
        if type(number) is not int or number != expected:
            raise CheckpointError(f"{file} is a pickle, but not a checkpoint that torch.save has written")
    system = unpickle(stream, file, max_work=SMALL_WORK)
    mentioned: dict[str, PickledStorage] = {}
    pickled = unpickle(stream, file, mentioned)
    keys = unpickle(stream, file, max_work=4 * len(mentioned) + SMALL_WORK)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise CheckpointError(f"{file}: the list of its storages is not one. Download it again")
    is_big_endian = isinstance(system, dict) and system.get("little_endian") is False
    storages: dict[str, Record] = {}
    end = os.fstat(stream.fileno()).st_size
    offset = stream.tell()
    for key in keys:
        if key not in mentioned:
            raise CheckpointError(f"{file}: storage {key!r} is not one that it mentions")
        stream.seek(offset)
        raw = stream.read(8)
        count = struct.unpack(">q" if is_big_endian else "<q", raw)[0] if len(raw) == 8 else -1
        if count != mentioned[key].total_elements:
            raise CheckpointError(f"{file} is truncated or corrupt at byte {offset:,}. Download it again")
        storages[key] = Record(offset + 8, count * ITEM_BYTES[mentioned[key].dtype])
        offset += 8 + storages[key].nbytes
    if offset > end:
        raise CheckpointError(
            f"{file} is truncated: it describes {counted(offset, 'byte')} and has {end:,}. Download it again"
        )
    return _Contents(pickled, storages, is_big_endian, is_mapped=False)


def _weights(pickled: Any, file: Path) -> Iterator[tuple[str, PickledTensor]]:
    """The tensors of a state dict by name; where there are none, those one level below, as training programs save."""
    candidates = [pickled, *(pickled.get(key) for key in WRAPPINGS)] if isinstance(pickled, dict) else []
    for candidate in candidates:
        if isinstance(candidate, dict):
            tensors = {name: value for name, value in candidate.items() if isinstance(value, PickledTensor)}
            if tensors:
                if not all(isinstance(name, str) for name in tensors):
                    raise CheckpointError(f"{file} has tensors without names: it is not a checkpoint of a model")
                return iter(tensors.items())
    raise CheckpointError(f"{file} has no tensors by name: it is not a checkpoint of a model")


def _place(name: str, tensor: PickledTensor, contents: _Contents, file: Path) -> StoredTensor | ScatteredTensor:
    storage, item_bytes = tensor.storage, ITEM_BYTES[tensor.dtype]
    record = contents.storages.get(storage.key)
    if record is None or record.nbytes != storage.total_elements * ITEM_BYTES[storage.dtype]:
        there = "is not in the file" if record is None else f"has {counted(record.nbytes, 'byte')} in the file"
        raise CheckpointError(
            f"{file}: tensor {name!r} belongs to a storage of {counted(storage.total_elements, 'element')}, which "
            f"{there}. Download it again"
        )
    count = math.prod(tensor.shape)
    steps = zip(tensor.shape, tensor.stride, strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps) if count else 0
    if (tensor.offset + span) * item_bytes > storage.nbytes or count * item_bytes > storage.nbytes:
        raise CheckpointError(
            f"{file}: tensor {name!r} {list(tensor.shape)} does not fit into its storage of "
            f"{counted(storage.nbytes, 'byte')}: the file is corrupt"
        )
    start = storage.start + tensor.offset * item_bytes
    offset = record.offset + start
    turned = contents.is_big_endian and item_bytes > 1
    if count and (turned or not _is_contiguous(tensor)):
        nbytes = span * item_bytes
        return ScatteredTensor(name, file, offset, nbytes, tensor.dtype, tensor.shape, tensor.stride, turned)
    resident_offset = None if contents.is_mapped else start
    return StoredTensor(name, file, offset, count * item_bytes, tensor.dtype, tensor.shape, resident_offset)


def _is_contiguous(tensor: PickledTensor) -> bool:
    """Whether the elements lie in order without gaps; strides of dimensions of size one do not matter."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
