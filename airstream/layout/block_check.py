"""This proves blocks that were packed without loss: they unpack, to numbers that have the checksum of each block.

It is fed a file's bytes as they come by. It knows blocks and where a tensor lies. It refuses to know who reads.
"""

from __future__ import annotations

import torch

from airstream.checkpoint.stored import StoredTensor
from airstream.codecs.lossless import bad_blocks
from airstream.codecs.lossless_blocks import LOSSLESS
from airstream.reporting.units import counted

__all__ = ["BlockCheck"]


class BlockCheck:
    """Counts the blocks of `tensor` that are not what was packed, as its bytes come by, in order."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._tensor = tensor
        self._rest = bytearray()
        self._num_seen = self._num_bad = 0
        self._first_bad: int | None = None

    @staticmethod
    def can_check(tensor: StoredTensor) -> bool:
        """Whether its blocks have checksums."""
        return tensor.block is not None and tensor.block.name in LOSSLESS

    def feed(self, offset: int, chunk: memoryview) -> None:
        """Look at `chunk`, which lies at `offset` of the file."""
        block = self._tensor.block
        assert block is not None
        start, end = max(self._tensor.offset, offset), min(self._tensor.end, offset + len(chunk))
        if start >= end:
            return
        data = chunk[start - offset : end - offset]
        if self._rest:  # a block that lies across two chunks
            needed = block.nbytes - len(self._rest)
            self._rest += data[:needed]
            data = data[needed:]
            if len(self._rest) == block.nbytes:
                self._look_at(self._rest)
                self._rest = bytearray()
        whole = len(data) - len(data) % block.nbytes
        self._look_at(data[:whole])
        self._rest += data[whole:]

    def _look_at(self, blocks: memoryview | bytearray) -> None:
        """Count `blocks`, whole ones."""
        block = self._tensor.block
        assert block is not None
        if not blocks:
            return
        bad = bad_blocks(torch.frombuffer(blocks, dtype=torch.uint8), block)
        if bad and self._first_bad is None:
            self._first_bad = self._num_seen + bad[0]
        self._num_bad += len(bad)
        self._num_seen += len(blocks) // block.nbytes

    def fault(self) -> str | None:
        """What is wrong with the blocks so far, if anything is."""
        if not self._num_bad:
            return None
        return (
            f"{self._tensor.file}: of tensor {self._tensor.name!r}, {counted(self._num_bad, 'block')} of "
            f"{self._num_seen:,} do not unpack to what was packed, the first is number {self._first_bad}"
        )
