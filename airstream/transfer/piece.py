"""A piece is what is read at once: bytes of a file, where they go, and what becomes of them on the way.

It knows bytes and items. It refuses to know who reads, and what memory a `Landing` has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from airstream.codecs.block_types import HOST_ONLY, BlockType


@dataclass(frozen=True, slots=True)
class Cast:
    """Items are stored as `source` and wanted as `target` (names as in `torch.<name>`).

    An item is a number, or, if `source` is the name of a block type, a block of several, or, if `ways` is more than 1,
    so many `rows` that are dealt out in turn: row r of the item goes to run r % ways of the runs that it becomes.
    """

    source: str | BlockType
    target: str
    source_item_bytes: int
    target_item_bytes: int
    rows: int = 1
    ways: int = 1

    @property
    def is_blocks(self) -> bool:
        """Whether an item is a block."""
        return isinstance(self.source, BlockType)

    @property
    def is_for_devices(self) -> bool:
        """Whether an item is a block that a device can decode."""
        return isinstance(self.source, BlockType) and self.source.name not in HOST_ONLY

    def bytes_made_of(self, nbytes: int) -> int:
        """The bytes that `nbytes`, whole items, become."""
        return nbytes // self.source_item_bytes * self.target_item_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """`nbytes` at `offset` of a file, and the byte of a slab at which they land (after `cast`, if there is one)."""

    file: Path
    offset: int
    nbytes: int
    target: int
    cast: Cast | None = None

    @property
    def target_bytes(self) -> int:
        """The bytes that the piece takes in the slab, after `cast`."""
        return self.nbytes if self.cast is None else self.cast.bytes_made_of(self.nbytes)


class Landing(Protocol):
    """Where bytes land. Both methods are called by worker `worker`, one piece at a time, and may block.

    `direct` says that the piece is read around the page cache, which ties the window's address to the file offset. It
    is decided once for each piece, and both are told the same, whatever becomes of the file meanwhile.
    """

    def window(self, worker: int, piece: Piece, direct: bool) -> memoryview:
        """`piece.nbytes` of memory to read into; if `direct`, at an address equal to the offset modulo a page.

        Or, if `direct`, room for all pages that the piece touches, which one read fills: a read of an edge waits as
        long as others do that are a thousand times larger.
        """

    def landed(self, worker: int, piece: Piece, direct: bool) -> None:
        """The window of `piece` has been filled."""


def split(piece: Piece, chunk_bytes: int) -> list[Piece]:
    """`piece` in parts of at most `chunk_bytes`, cut at multiples of it in the file, to keep direct reads aligned."""
    chunks: list[Piece] = []
    done = 0
    while done < piece.nbytes:
        start = piece.offset + done
        size = min(chunk_bytes - start % chunk_bytes, piece.nbytes - done)
        if piece.cast is not None and done + size < piece.nbytes:  # never cut through an element
            size = max(size - (done + size) % piece.cast.source_item_bytes, piece.cast.source_item_bytes)
        target = piece.target + Piece(piece.file, start, done, 0, piece.cast).target_bytes
        chunks.append(Piece(piece.file, start, size, target, piece.cast))
        done += size
    return chunks
