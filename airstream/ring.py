"""Where in the ring's memory each layer batch lies. Offsets only: no memory, no threads, no waiting."""

from __future__ import annotations

from collections.abc import Iterator

from airstream.checkpoint.files import PAGE_BYTES
from airstream.units import round_up


class Ring:
    """A run of `nbytes` bytes in which batches of different sizes come and go.

    Batches need not have a slot's size: a large lm_head takes its room only while it is there.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._spans: dict[int, tuple[int, int]] = {}  # batch -> (start, end), in order of start

    def place(self, batch: int, nbytes: int) -> int | None:
        """The page-aligned offset of a free span of `nbytes`, now taken by `batch`; None if there is none."""
        start = next((gap for gap, end in self._gaps() if end - gap >= nbytes), None)
        if start is not None:
            self._spans[batch] = (start, round_up(start + nbytes, PAGE_BYTES))
            self._spans = dict(sorted(self._spans.items(), key=lambda item: item[1]))
        return start

    def free(self, batch: int) -> None:
        """Give the span of `batch` back."""
        del self._spans[batch]

    def _gaps(self) -> Iterator[tuple[int, int]]:
        position = 0
        for start, end in self._spans.values():
            yield position, start
            position = end
        yield position, self.nbytes


def ring_bytes(batch_bytes: list[int], depth: int) -> int:
    """The smallest ring that holds any `depth` batches which follow each other, the first after the last included."""
    sizes = [round_up(nbytes, PAGE_BYTES) for nbytes in batch_bytes]
    depth = min(depth, len(sizes))
    return max((sum((sizes + sizes)[start : start + depth]) for start in range(len(sizes))), default=0)
