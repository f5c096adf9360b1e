"""This says what packed weights cost: bytes on disk, and what it takes a CPU, and a device, to make them dense.

It refuses to know the memory that decoding takes: `transfer.buffers` says that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from airstream.codecs.block_types import BlockType
from airstream.codecs.rates import decoding_seconds, dense_seconds
from airstream.codecs.traffic import decoding_traffic
from airstream.compat.quantizer import Quantizer
from airstream.layout.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Packed:
    """The cost of some tensors.

    Attributes:
        stored_bytes: their bytes on disk.
        decoding_seconds: what one CPU core takes to decode them.
        decoding_traffic: the bytes of its memory that an accelerator passes over to decode them.
    """

    stored_bytes: int
    decoding_seconds: float
    decoding_traffic: float


def measure_packed(specs: Iterable[TensorSpec]) -> Packed | None:
    """The cost of `specs`; None if none of them is packed. Measures each type of block once: some milliseconds."""
    sources: dict[str, TensorSpec] = {}
    for spec in specs:
        sources |= {each.name: each for each in (spec.made_by.sources if spec.made_by else (spec,))}
    pieces = [piece for spec in sources.values() for piece in spec.pieces]
    casts = [(piece.nbytes, piece.cast.source, piece.cast.target) for piece in pieces if piece.cast]
    blocks = [(nbytes, source, target) for nbytes, source, target in casts if isinstance(source, BlockType)]
    if not blocks:
        return None
    typical = {block.name: block for _, block, _ in blocks}  # each tensor may have blocks of its own size
    seconds = traffic = 0.0
    for nbytes, block, target in blocks:
        numbers = nbytes / block.nbytes * block.elements
        seconds += numbers * decoding_seconds(typical[block.name])
        traffic += numbers * decoding_traffic(typical[block.name], getattr(torch, target))
    return Packed(sum(piece.nbytes for piece in pieces), seconds, traffic)


def expanding_seconds(quantizer: Quantizer | None, specs: Iterable[TensorSpec]) -> float:
    """What it takes one CPU core to make `specs` dense for a byte of them on disk, where a kernel of ours does it."""
    if quantizer is None or quantizer.kernel is None:
        return 0.0
    made = {spec.name: spec for spec in specs}.values()
    stored_bytes = sum(source.nbytes for spec in made for source in (spec.made_by.sources if spec.made_by else (spec,)))
    numbers = sum(math.prod(spec.shape) for spec in made if spec.made_by)
    return numbers * dense_seconds(quantizer.kernel) / max(stored_bytes, 1)
