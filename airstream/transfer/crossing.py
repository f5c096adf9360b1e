"""A crossing is what goes from host memory to a device at once: which bytes, to where, and what becomes of them there.

It knows bytes and items. It refuses to know which tensor they belong to, and by which way they go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from airstream.transfer.piece import Cast


@dataclass(frozen=True, slots=True)
class Crossing:
    """`nbytes` from byte `source` of host memory to byte `target` of device memory, there through `cast`, if any."""

    source: int
    nbytes: int
    target: int
    cast: Cast | None = None

    @property
    def target_bytes(self) -> int:
        """The bytes that it takes on the device, after `cast`."""
        return self.nbytes if self.cast is None else self.cast.bytes_made_of(self.nbytes)

    def chunks(self, chunk_bytes: int) -> Iterator[Crossing]:
        """This one in parts of whole items, each as many as are no more than `chunk_bytes`, but at least one."""
        item_bytes = 1 if self.cast is None else self.cast.source_item_bytes
        step = max(chunk_bytes // item_bytes, 1) * item_bytes
        for done in range(0, self.nbytes, step):
            before = replace(self, nbytes=done)
            size = min(step, self.nbytes - done)
            yield Crossing(self.source + done, size, self.target + before.target_bytes, self.cast)
