"""This has the ways in which a checkpoint can be written anew, as data: as it is, packed, unpacked, quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from airstream.checkpoint.safetensors_writer import METADATA
from airstream.checkpoint.stored import StoredTensor
from airstream.codecs.names import LOSSLESS_CODEC
from airstream.loading.prepared import Prepared
from airstream.repacking.pack import expected_bytes, write_packed
from airstream.repacking.plan import Shard
from airstream.repacking.quantise import Quantisation
from airstream.repacking.write import OnBytes, header_of, write_shard
from airstream.repacking.write_quantised import write_quantised

__all__ = ["Way", "way_of"]


@dataclass(frozen=True, slots=True)
class Way:
    """How a checkpoint is written.

    Attributes:
        write: what writes a file, and gives its SHA-256.
        expected_bytes: that the file is going to have, or about so many.
        on_pages: every layer begins on a page of a file.
        made_of: what is written in the place of a tensor.
        metadata: what the header of every file says.
        config: gives the contents of config.json, of that of the source; None if they stay as they are.
    """

    write: Callable[[Path, Shard, OnBytes], str]
    expected_bytes: Callable[[Shard], int]
    on_pages: bool = False
    made_of: Callable[[StoredTensor], Sequence[StoredTensor]] = lambda tensor: (tensor,)
    metadata: Mapping[str, str] = METADATA
    config: Callable[[Path], Mapping[str, Any]] | None = None


def _exact_bytes(shard: Shard) -> int:
    return len(header_of(shard)) + shard.nbytes


def way_of(codec: str | None, prepared: Prepared) -> Way:
    """The way to write `prepared` with `codec`, or plain if there is none.

    Raises:
        UnsupportedError: it cannot be quantised so; the message says why.
    """
    if codec is None:
        if any(tensor.block is not None for tensor in prepared.index.values()):
            return Way(partial(write_packed, to_plain=True), partial(expected_bytes, to_plain=True))
        return Way(write_shard, _exact_bytes, on_pages=True)
    if codec == LOSSLESS_CODEC:
        return Way(write_packed, expected_bytes)
    made = Quantisation(prepared, codec)
    write = partial(write_quantised, quantisation=made)
    return Way(write, _exact_bytes, True, made.made_of, made.metadata, made.config)
