"""This has the ways in which a file of a repacked checkpoint can be written, as data: as it is, packed, or unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from airstream.checkpoint.stored import StoredTensor
from airstream.codecs.names import CODECS, LOSSLESS_CODEC
from airstream.errors import ArgumentError
from airstream.repacking.pack import expected_bytes, write_packed
from airstream.repacking.plan import Shard
from airstream.repacking.write import OnBytes, header_of, write_shard

__all__ = ["Way", "way_of"]


@dataclass(frozen=True, slots=True)
class Way:
    """How a file is written.

    Attributes:
        write: what writes a file, and gives its SHA-256.
        expected_bytes: that the file is going to have, or about so many.
        on_pages: every layer begins on a page of a file.
    """

    write: Callable[[Path, Shard, OnBytes], str]
    expected_bytes: Callable[[Shard], int]
    on_pages: bool = False


AS_IT_IS = Way(write_shard, lambda shard: len(header_of(shard)) + shard.nbytes, on_pages=True)
PACKED = Way(write_packed, expected_bytes)
UNPACKED = Way(partial(write_packed, to_plain=True), partial(expected_bytes, to_plain=True))


def way_of(codec: str | None, tensors: Iterable[StoredTensor]) -> Way:
    """The way to write `tensors` with `codec`, or plain if there is none.

    Raises:
        ArgumentError: there is no such codec.
    """
    if codec is None:
        return UNPACKED if any(tensor.block is not None for tensor in tensors) else AS_IT_IS
    if codec == LOSSLESS_CODEC:
        return PACKED
    raise ArgumentError(f"codec={codec!r} is not known: {', '.join(map(repr, CODECS))} is, or none")
