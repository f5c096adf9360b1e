"""This writes one file of a repacked checkpoint: the header, then ranges of other files, with a checksum on the way.

It knows bytes. A file gets its name when it is whole and on the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from airstream.layout.shards import Shard, header_of
from airstream.transfer.descriptors import Descriptors
from airstream.transfer.files import WeightFile, failure_of
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.reader import CHUNK_BYTES

OnBytes = Callable[[int], object]


def write_shard(file: Path, shard: Shard, on_bytes: OnBytes) -> str:
    """Write `shard` to `file`, whole and on the disk or not at all. Returns its SHA-256. Blocks.

    Args:
        on_bytes: told how many bytes of tensors have been written since the last time.

    Raises:
        CheckpointError, ReadError: a file that it is made of is gone, another one, or cannot be read.
        BudgetError: there is no memory for two buffers.
    """
    part = file.with_name(file.name + ".part")
    digest = hashlib.sha256()
    with part.open("wb", buffering=0) as out, ThreadPoolExecutor(1, "airstream-repack") as writer:

        def take(chunk: memoryview | bytes) -> None:
            digest.update(chunk)
            write_all(out, chunk)

        take(header_of(shard))
        pending: Future[None] | None = None
        for chunk in _chunks(shard):
            if pending is not None:
                pending.result()
            pending = writer.submit(take, chunk)
            on_bytes(len(chunk))
        if pending is not None:
            pending.result()
        os.fsync(out.fileno())
    part.replace(file)
    return digest.hexdigest()


def write_all(out: BinaryIO, chunk: memoryview | bytes) -> None:
    """Write all of `chunk` to `out`, which has no buffer and may take less at a time."""
    done = 0
    while done < len(chunk):
        done += out.write(chunk[done:]) or 0


def _chunks(shard: Shard) -> Iterator[memoryview]:
    """The bytes of the tensors, in two buffers in turn: a chunk is valid until the next but one is asked for."""
    buffers = [HostBuffer(CHUNK_BYTES).view for _ in range(2)]
    files: dict[Path, WeightFile] = {}
    descriptors = Descriptors()
    turn = 0
    try:
        for file, offset, nbytes in _runs(shard):
            if file not in files:
                files[file] = WeightFile(file, direct=False, descriptors=descriptors)
            for start in range(0, nbytes, CHUNK_BYTES):
                turn = 1 - turn
                chunk = buffers[turn][: min(CHUNK_BYTES, nbytes - start)]
                files[file].read_into(chunk, offset + start, len(chunk))
                yield chunk
    finally:
        for opened in files.values():
            opened.close()


def _runs(shard: Shard) -> Iterator[tuple[Path, int, int]]:
    """Ranges of files: tensors that lie side by side already are read as one."""
    run: tuple[Path, int, int] | None = None
    for tensor in shard.tensors:
        if run is not None and tensor.file == run[0] and tensor.offset == run[1] + run[2]:
            run = (run[0], run[1], run[2] + tensor.nbytes)
            continue
        if run is not None:
            yield run
        run = (tensor.file, tensor.offset, tensor.nbytes)
    if run is not None:
        yield run


def copy_small(file: Path, copy: Path) -> None:
    """Write the contents of `file`, a few megabytes at most, to `copy`.

    Raises:
        ReadError: `file` cannot be read.
    """
    try:
        contents = file.read_bytes()
    except (OSError, MemoryError) as error:
        raise failure_of(f"reading {file}", error) from error
    copy.write_bytes(contents)


def sha256_of(file: Path, on_bytes: OnBytes = lambda _: None) -> str:
    """The SHA-256 of a file, read once."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
    return digest.hexdigest()
