"""These are the ways in which a checkpoint can be written anew: as it is, packed, unpacked, quantised."""

from __future__ import annotations

from functools import partial

from airstream.codecs.names import LOSSLESS_CODEC
from airstream.compat.asked_formats import AskedFormat
from airstream.layout.shards import Shard, header_of
from airstream.loading.prepared import Prepared
from airstream.repacking.pack import expected_bytes, write_packed
from airstream.repacking.quantise import Quantisation
from airstream.repacking.way import Way
from airstream.repacking.write import write_shard
from airstream.repacking.write_quantised import write_quantised

__all__ = ["way_of"]


def _exact_bytes(shard: Shard) -> int:
    return len(header_of(shard)) + shard.nbytes


def way_of(codec: str | AskedFormat | None, prepared: Prepared) -> Way:
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
