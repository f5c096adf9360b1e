"""This reads every byte of a file once, around the page cache: for its checksum, for those of its blocks, and for
values that are no numbers.

It knows files and elements. A disk that fails to give a byte back is a fault like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import torch

from airstream.checkpoint.stored import ITEM_BYTES, StoredTensor
from airstream.errors import BudgetError, CheckpointError, ReadError
from airstream.layout.block_check import BlockCheck
from airstream.layout.pieces import TORCH_DTYPES
from airstream.reporting.units import counted, round_up
from airstream.transfer.files import PAGE_BYTES, WeightFile, failure_of
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.reader import CHUNK_BYTES
from airstream.verification.checksums import Checksum

OnBytes = Callable[[int], object]


def check_file(
    file: Path, checksum: Checksum | None, tensors: Sequence[StoredTensor], deep: bool, on_bytes: OnBytes
) -> list[str]:
    """What is wrong with the bytes of `file`: that it cannot be read is. Blocks; takes 16 MiB of memory.

    Args:
        checksum: that it should have, if that is known.
        tensors: in it. Blocks that have a checksum of their own are unpacked.
        deep: look at the values of those that are not packed.

    Raises:
        BudgetError: there is not so much memory.
    """
    names = {tensor.name for tensor in tensors}
    scans: list[_Scan | BlockCheck] = [_Scan(tensor) for tensor in tensors if deep and _has_fractions(tensor, names)]
    scans += [BlockCheck(tensor) for tensor in tensors if BlockCheck.can_check(tensor)]
    try:
        size = file.stat().st_size
        digest = checksum.digest(size) if checksum is not None else None
        for offset, chunk in _chunks(file, size):
            if digest is not None:
                digest.update(chunk)
            for scan in scans:
                scan.feed(offset, chunk)
            on_bytes(len(chunk))
    except FileNotFoundError:
        return [f"{file} is missing"]
    except (ReadError, CheckpointError) as error:
        return [str(error)]
    except BudgetError:
        raise
    except (OSError, MemoryError) as error:
        failure = failure_of(f"reading {file}", error)
        if isinstance(failure, BudgetError):
            raise failure from error
        return [str(failure)]
    faults = [fault for scan in scans if (fault := scan.fault())]
    if checksum is not None and digest is not None and digest.hexdigest() != checksum.hexadecimal:
        faults.insert(
            0,
            f"{file} is corrupt: its checksum is {digest.hexdigest()}, according to {checksum.said_by} it should be "
            f"{checksum.hexadecimal}. Make or download it again",
        )
    return faults


def _has_fractions(tensor: StoredTensor, names: AbstractSet[str]) -> bool:
    """Whether its values may be NaN: not those of packed weights, which are whole numbers beside a scale.

    Such are blocks, and what bitsandbytes calls numbers of another type, with scales among the `names` in the file.
    """
    is_packed = tensor.block is not None or f"{tensor.name}.absmax" in names
    return not is_packed and TORCH_DTYPES[tensor.dtype].is_floating_point


def _chunks(file: Path, size: int) -> Iterator[tuple[int, memoryview]]:
    buffer = HostBuffer(CHUNK_BYTES).view
    opened = WeightFile(file, direct=True)
    try:
        for offset in range(0, size, CHUNK_BYTES):
            count = min(CHUNK_BYTES, size - offset)
            opened.read_into(buffer[: round_up(count, PAGE_BYTES)], offset, count)
            yield offset, buffer[:count]
    finally:
        opened.close()


class _Scan:
    """Counts the values of one tensor that are NaN or infinite, as its bytes come by."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._tensor = tensor
        self._dtype = TORCH_DTYPES[tensor.dtype]
        self._rest = bytearray()
        self._count = 0

    def feed(self, offset: int, chunk: memoryview) -> None:
        start, end = max(self._tensor.offset, offset), min(self._tensor.end, offset + len(chunk))
        if start >= end:
            return
        data = self._rest + chunk[start - offset : end - offset]
        item_bytes = ITEM_BYTES[self._tensor.dtype]
        whole = len(data) - len(data) % item_bytes  # an element may lie across two chunks
        self._rest = data[whole:]
        if whole:
            values = torch.frombuffer(data, dtype=self._dtype, count=whole // item_bytes)
            values = values.float() if item_bytes == 1 else values  # torch cannot ask float8 directly
            self._count += int(values.numel() - torch.isfinite(values).sum())

    def fault(self) -> str | None:
        if not self._count:
            return None
        found = f"{counted(self._count, 'value')} that {'is' if self._count == 1 else 'are'} NaN or infinite"
        return f"{self._tensor.file}: tensor {self._tensor.name!r} has {found}"
