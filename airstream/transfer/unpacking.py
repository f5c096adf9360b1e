"""Blocks may lie in memory as they are stored, and be unpacked by whoever computes, each time or once.

They land at the end of the place of their numbers, or stay elsewhere. So reads land in place, threads that read leave
the processor's cores to those that compute, and nothing takes memory besides. It knows pieces and memory. It refuses to
know tensors, and how blocks are unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from airstream.codecs.block_types import BlockType
from airstream.codecs.in_place import may_unpack, unpack_in_place
from airstream.errors import CheckpointError
from airstream.reporting.probe import CONVERT, Moment, Probe
from airstream.reporting.units import counted
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.piece import Piece

__all__ = ["Unpacking", "as_stored", "blamed_on", "unpack"]


@dataclass(frozen=True, slots=True)
class Unpacking:
    """What is to be done for `piece`, which has a cast, and its numbers a place.

    Attributes:
        start: the byte of the same memory at which its blocks begin.
        kept: the name of what they are elsewhere, if they are.
    """

    piece: Piece
    start: int = 0
    kept: str | None = None


def as_stored(piece: Piece, room: int = 0) -> Piece | None:
    """What is read so that `piece` lies at the end of its place as it is stored, to be unpacked; None if it cannot be.

    Args:
        room: what is free behind its numbers. With a page of it, blocks lie in their page as in the file, and direct
            reads bring them to where they stay.
    """
    cast = piece.cast
    if cast is None or cast.ways > 1 or not isinstance(cast.source, BlockType):
        return None
    if not may_unpack(cast.source, getattr(torch, cast.target)):
        return None
    start = piece.target + piece.target_bytes - piece.nbytes
    shift = (piece.offset - start) % PAGE_BYTES
    return replace(piece, target=start + (shift if shift < room else 0), cast=None)


def unpack(
    unpackings: Iterable[Unpacking],
    memory: torch.Tensor,
    kept: Mapping[str, torch.Tensor],
    probe: Probe,
    moment: Callable[[], Moment],
) -> None:
    """Unpack to `memory`, uint8 of the host, what has landed there, and what is `kept`. `probe` is told.

    Raises:
        CheckpointError: a block is damaged; the message names the file.
    """
    for each in unpackings:
        piece, cast = each.piece, each.piece.cast
        assert cast is not None
        assert isinstance(cast.source, BlockType)
        numbers = memory[piece.target : piece.target + piece.target_bytes].view(getattr(torch, cast.target))
        packed = memory[each.start : each.start + piece.nbytes] if each.kept is None else kept[each.kept]
        with probe.span(CONVERT, piece.nbytes, moment), blamed_on(piece):
            unpack_in_place(numbers, packed, cast.source)


@contextmanager
def blamed_on(piece: Piece) -> Iterator[None]:
    """Name the file in what is said of bytes that cannot be unpacked."""
    try:
        yield
    except CheckpointError as error:
        where = f"{piece.file}, of {counted(piece.nbytes, 'byte')} at {piece.offset:,}"
        raise CheckpointError(f"{where}: {error}") from error
