"""This says what weights that are stored as blocks cost: bytes on disk, and time of a CPU to decode them.

It refuses to know the memory that decoding takes: `transfer.buffers` says that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from airstream.codecs.block_types import BlockType
from airstream.codecs.decode import decoding_seconds
from airstream.layout.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Packed:
    """The cost of some tensors: their bytes on disk, and the seconds that one CPU core takes to decode them."""

    stored_bytes: int
    decoding_seconds: float


def measure_packed(specs: Iterable[TensorSpec]) -> Packed | None:
    """The cost of `specs`; None if none of them is packed. Measures each type of block once: some milliseconds."""
    sources: dict[str, TensorSpec] = {}
    for spec in specs:
        sources |= {each.name: each for each in (spec.made_by.sources if spec.made_by else (spec,))}
    pieces = [piece for spec in sources.values() for piece in spec.pieces]
    casts = [(piece.nbytes, piece.cast.source) for piece in pieces if piece.cast]
    blocks = [(nbytes, source) for nbytes, source in casts if isinstance(source, BlockType)]
    if not blocks:
        return None
    typical = {block.name: block for _, block in blocks}  # each tensor may have blocks of its own size
    seconds = sum(
        nbytes / block.nbytes * block.elements * decoding_seconds(typical[block.name]) for nbytes, block in blocks
    )
    return Packed(sum(piece.nbytes for piece in pieces), seconds)
