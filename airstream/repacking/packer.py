"""This packs one tensor after the other without loss, each where that makes it smaller; or unpacks them.

A tensor that is packed is read twice, some megabytes at a time, by several threads: to choose its blocks, and to fill
them.

It knows tensors in files, and codecs. It refuses to know what else is in the file that they go to.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, TypeVar

import torch

from airstream.checkpoint.packed_tensors import line_of
from airstream.checkpoint.stored import StoredTensor
from airstream.codecs.block_types import BlockType
from airstream.codecs.decode import decode_into
from airstream.codecs.lossless_pack import Survey, encode
from airstream.layout.packable import may_pack
from airstream.repacking.write import OnBytes, write_all
from airstream.transfer.descriptors import Descriptors
from airstream.transfer.files import WeightFile
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.reader import CHUNK_BYTES

__all__ = ["PACKED_SHARE", "Packer"]

PACKED_SHARE = 0.78
"""Of their bytes, that trained weights pack to: 70-76 % in those that were measured."""

NUM_THREADS = min(os.cpu_count() or 1, 8)
"""Each has a buffer for what it reads, and makes what it packs."""

T = TypeVar("T")

Function = Callable[[Survey | None, torch.Tensor], T]
"""Of what was counted of a chunk, if it was, and of its bytes."""


class Packer:
    """Reads tensors and writes them packed, or all of them plain. `on_bytes` is told how many bytes are done."""

    def __init__(self, on_bytes: OnBytes, to_plain: bool) -> None:
        self._on_bytes = on_bytes
        self._to_plain = to_plain
        self._files: dict[Path, WeightFile] = {}
        self._descriptors = Descriptors()
        self._buffers: SimpleQueue[HostBuffer] = SimpleQueue()
        for _ in range(NUM_THREADS):
            self._buffers.put(HostBuffer(CHUNK_BYTES))
        self._pool = ThreadPoolExecutor(NUM_THREADS, "airstream-pack")

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def write(self, tensor: StoredTensor, file: Path, offset: int, out: BinaryIO) -> StoredTensor:
        """Write `tensor` to `out`, which is at `offset` of `file`; how it lies there. Blocks.

        Raises:
            CheckpointError, ReadError: it cannot be read.
        """
        block, counted = None if self._to_plain else tensor.block, list[Survey]()
        if block is None and not self._to_plain and may_pack(tensor):
            block, counted = self._surveyed(tensor)
        end = offset
        for chunk in self._mapped(tensor, partial(_changed, tensor.block, block), counted):
            write_all(out, chunk.numpy().data)
            end += chunk.numel()
        line = None if self._to_plain else line_of(tensor)
        return replace(tensor, file=file, offset=offset, nbytes=end - offset, block=block, resident_offset=line)

    def _surveyed(self, tensor: StoredTensor) -> tuple[BlockType | None, list[Survey]]:
        """The blocks that make plain `tensor` smallest, None if none does; and what was counted of each chunk."""
        survey, counted = Survey(tensor.shape[-1]), [Survey(tensor.shape[-1]) for _ in _chunks(tensor)]
        for part in self._mapped(tensor, _survey, counted, is_last=False):
            survey.join(part)
        return survey.block(), counted

    def _mapped(
        self, tensor: StoredTensor, function: Function[T], counted: Sequence[Survey], is_last: bool = True
    ) -> Iterator[T]:
        """`function` of the bytes of `tensor`, whole rows at a time, in order; some of them are under way ahead."""
        pending: deque[tuple[Future[T], int]] = deque()
        for (start, nbytes), survey in zip_longest(_chunks(tensor), counted):
            if len(pending) == NUM_THREADS:
                yield self._finished(pending, is_last)
            pending.append((self._pool.submit(self._run, tensor, start, nbytes, partial(function, survey)), nbytes))
        while pending:
            yield self._finished(pending, is_last)

    def _finished(self, pending: deque[tuple[Future[T], int]], is_last: bool) -> T:
        future, nbytes = pending.popleft()
        result = future.result()
        if is_last:
            self._on_bytes(nbytes)
        return result

    def _run(self, tensor: StoredTensor, start: int, nbytes: int, function: Callable[[torch.Tensor], T]) -> T:
        buffer = self._buffers.get()
        try:
            self._opened(tensor.file).read_into(buffer.view[:nbytes], tensor.offset + start, nbytes)
            return function(buffer.tensor[:nbytes])
        finally:
            self._buffers.put(buffer)

    def _opened(self, file: Path) -> WeightFile:
        if file not in self._files:
            self._files.setdefault(file, WeightFile(file, direct=False, descriptors=self._descriptors))
        return self._files[file]


def _survey(survey: Survey | None, data: torch.Tensor) -> Survey:
    assert survey is not None
    survey.add(data.view(torch.bfloat16))
    return survey


def _changed(old: BlockType | None, new: BlockType | None, counted: Survey | None, data: torch.Tensor) -> torch.Tensor:
    if old == new:
        return data.clone()  # it is a buffer
    if new is not None:
        return encode(data.view(torch.bfloat16), new, counted.bases(new) if counted else None)
    assert old is not None
    numbers = torch.empty(data.numel() // old.nbytes * old.elements, dtype=getattr(torch, old.dtype), device="cpu")
    decode_into(numbers, data, old)
    return numbers.view(torch.uint8)


def _chunks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Where in the tensor each chunk begins, and its bytes: whole blocks, or rows, where those are to be packed."""
    unit = tensor.block.nbytes if tensor.block else 2 * tensor.shape[-1] if may_pack(tensor) else 1
    step = CHUNK_BYTES // unit * unit
    for start in range(0, tensor.nbytes, step):
        yield start, min(step, tensor.nbytes - start)
