"""This writes one file of a checkpoint whose weights are quantised on the way: some rows at a time, each to its place.

What a weight becomes lies apart in the file: wide numbers before narrow ones. So it is written out of order, and the
checksum is taken of the whole file at the end. It knows bytes, rows and places. It refuses to know formats.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from airstream.checkpoint.stored import StoredTensor
from airstream.compat.quantising import ROW_STEP
from airstream.errors import UnsupportedError
from airstream.layout.shards import Shard, header_of
from airstream.repacking.write import OnBytes, sha256_of
from airstream.reporting.units import counted
from airstream.transfer.descriptors import Descriptors
from airstream.transfer.files import WeightFile
from airstream.transfer.host_memory import HostBuffer


class Quantising(Protocol):
    """Gives what stands for a tensor, some rows at a time: see `quantise`."""

    def source_of(self, tensor: StoredTensor) -> StoredTensor | None:
        """The tensor of the checkpoint that `tensor` is made of; None if it stays as it is."""

    def of_weight(self, source: StoredTensor) -> Iterator[tuple[str, memoryview]]:
        """What belongs to `source` as a whole, by name."""

    def of_rows(self, source: StoredTensor, raw: torch.Tensor) -> Iterator[tuple[str, memoryview]]:
        """What some rows of `source`, its bytes, become, by name."""


STRIP_BYTES = 1 << 20
"""Of a weight at a time, if that are rows enough: what quantising takes besides, several times as much, stays in the
cache of a processor."""


def write_quantised(file: Path, shard: Shard, on_bytes: OnBytes, quantisation: Quantising) -> str:
    """Write `shard` to `file`, whole and on the disk or not at all. Returns its SHA-256. Blocks.

    Args:
        on_bytes: told how many bytes of tensors have been written since the last time.

    Raises:
        CheckpointError, ReadError: a file that it is made of is gone, another one, or cannot be read.
        BudgetError: there is no memory for a buffer.
        UnsupportedError: the package that quantises makes something else of values than it said it would.
    """
    part = file.with_name(file.name + ".part")
    header = header_of(shard)
    ends = accumulate((tensor.nbytes for tensor in shard.tensors), initial=len(header))
    places = dict(zip((tensor.name for tensor in shard.tensors), ends, strict=False))
    sources = {quantisation.source_of(tensor) or tensor: None for tensor in shard.tensors}
    with part.open("wb", buffering=0) as out:
        _write(out, 0, header)
        for name, contents in _contents(list(sources), quantisation):
            _write(out, places[name], contents)
            places[name] += len(contents)
            on_bytes(len(contents))
        os.fsync(out.fileno())
    _check_filled(shard, len(header), places)
    digest = sha256_of(part)
    part.replace(file)
    return digest


def _contents(sources: Sequence[StoredTensor], quantisation: Quantising) -> Iterator[tuple[str, memoryview]]:
    """The next bytes of a tensor, and its name."""
    for source in sources:
        yield from quantisation.of_weight(source)
    for source, raw in _strips(sources):
        yield from quantisation.of_rows(source, raw)


def _strips(sources: Sequence[StoredTensor]) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
    """The bytes of some rows of each tensor in turn, in one buffer: valid until the next are asked for."""
    buffer = HostBuffer(max(_strip_bytes(source) for source in sources))
    files: dict[Path, WeightFile] = {}
    descriptors = Descriptors()
    try:
        for source in sources:
            if source.file not in files:
                files[source.file] = WeightFile(source.file, direct=False, descriptors=descriptors)
            for start in range(0, source.nbytes, _strip_bytes(source)):
                size = min(_strip_bytes(source), source.nbytes - start)
                files[source.file].read_into(buffer.view[:size], source.offset + start, size)
                yield source, buffer.tensor[:size]
    finally:
        for opened in files.values():
            opened.close()


def _strip_bytes(source: StoredTensor) -> int:
    """The bytes of so many rows of `source` as are read at a time."""
    num_rows = source.shape[0] if source.shape else 1
    step = max(ROW_STEP * source.nbytes // max(num_rows, 1), 1)
    return max(step, STRIP_BYTES // step * step)


def _write(out: FileIO, offset: int, contents: memoryview | bytes) -> None:
    out.seek(offset)
    done = 0
    while done < len(contents):
        done += out.write(contents[done:]) or 0


def _check_filled(shard: Shard, start: int, ends: Mapping[str, int]) -> None:
    """Refuse a file with gaps."""
    for tensor in shard.tensors:
        start += tensor.nbytes
        if ends[tensor.name] != start:
            raise UnsupportedError(
                f"tensor {tensor.name!r} should have {counted(tensor.nbytes, 'byte')}, and has "
                f"{counted(ends[tensor.name] - start + tensor.nbytes, 'byte')}: the package that quantises is of a "
                "release that this airstream does not know"
            )
