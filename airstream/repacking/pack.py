"""This writes one file of a checkpoint whose tensors are packed without loss, and reads it again to prove it.

What a tensor packs to is known when all of it has been looked at. So the header comes last, into room that was left for
it.

It knows one file. It refuses to know the order of tensors, and how one of them is packed (`packer`).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from airstream.checkpoint.packed_tensors import header_room, packed_header
from airstream.checkpoint.stored import ITEM_BYTES, StoredTensor
from airstream.errors import ReadError
from airstream.layout.block_check import BlockCheck
from airstream.layout.packable import may_pack
from airstream.layout.shards import Shard
from airstream.repacking.packer import PACKED_SHARE, Packer
from airstream.repacking.write import OnBytes, write_all
from airstream.transfer.reader import CHUNK_BYTES


def write_packed(file: Path, shard: Shard, on_bytes: OnBytes, to_plain: bool = False) -> str:
    """Write `shard` to `file`, packed, whole and on the disk or not at all. Returns its SHA-256. Blocks.

    Args:
        to_plain: write it plain, though it may be packed already.
        on_bytes: told how many bytes of tensors have been packed since the last time.

    Raises:
        CheckpointError, ReadError: a file that it is made of is gone, another one, or cannot be read; or what was
            written does not read back.
        BudgetError: there is no memory for the buffers.
    """
    part = file.with_name(file.name + ".part")
    room = header_room(shard.tensors)
    with part.open("w+b", buffering=0) as out, Packer(on_bytes, to_plain) as packer:
        out.seek(room)
        written, end = list[StoredTensor](), room
        for tensor in shard.tensors:
            written.append(packer.write(tensor, part, end, out))
            end = written[-1].end
        out.seek(0)
        write_all(out, packed_header(written, room))
        os.fsync(out.fileno())
    digest = _read_back(part, written)
    part.replace(file)
    return digest


def expected_bytes(shard: Shard, to_plain: bool = False) -> int:
    """About as much as `shard` takes when it is written."""
    share = {True: PACKED_SHARE, False: 1.0}
    sizes = (
        math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] if to_plain else tensor.nbytes * share[may_pack(tensor)]
        for tensor in shard.tensors
    )
    return header_room(shard.tensors) + int(sum(sizes))


def _read_back(file: Path, tensors: Iterable[StoredTensor]) -> str:
    """The SHA-256 of `file`, whose `tensors` unpack to what their checksums say.

    Raises:
        ReadError: one does not.
    """
    checks = [BlockCheck(tensor) for tensor in tensors if BlockCheck.can_check(tensor)]
    digest, offset = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream, ThreadPoolExecutor(1, "airstream-digest") as other:
        while count := stream.readinto(buffer):
            digested = other.submit(digest.update, buffer[:count])
            for check in checks:
                check.feed(offset, buffer[:count])
            digested.result()
            offset += count
    for check in checks:
        if fault := check.fault():
            raise ReadError(f"{fault}, though it was just written: the disk or the memory is not sound")
    return digest.hexdigest()
