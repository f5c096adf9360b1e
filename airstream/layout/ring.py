"""The ring says where in its memory each layer batch lies. It gives offsets only: no memory, no threads, no waiting."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from airstream.reporting.units import round_up
from airstream.transfer.files import PAGE_BYTES

ALIKE = 0.02
"""Batches whose sizes differ by no more than this share take the same room."""


class Ring:
    """A run of `nbytes` bytes in which batches of different sizes come and go.

    Batches need not have a slot's size: a large lm_head takes its room only while it is there.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._spans: dict[int, tuple[int, int]] = {}  # batch -> (start, end)

    def place(self, batch: int, nbytes: int, spare: Collection[int] = ()) -> tuple[int, list[int]] | None:
        """Give `batch` a page-aligned span of `nbytes` bytes.

        Spans of the batches in `spare` count as free; those that are overwritten are given back.

        Returns:
            The offset, and which of `spare` lost their place; None if there is no room.
        """
        size = round_up(nbytes, PAGE_BYTES)
        offset = self._find(size, spare)
        if offset is None:
            return None
        lost = [other for other, (start, end) in self._spans.items() if start < offset + size and offset < end]
        for other in lost:
            self.free(other)
        self._spans[batch] = (offset, offset + size)
        return offset, lost

    def free(self, batch: int) -> None:
        """Give the span of `batch` back."""
        del self._spans[batch]

    def _find(self, size: int, spare: Collection[int]) -> int | None:
        for start, end in self._gaps(spare):
            if end - start >= size:
                # Against the far end if the gap reaches it: what is left free stays in one piece.
                return end - size if start and end == self.nbytes else start
        return None

    def _gaps(self, spare: Collection[int]) -> Iterator[tuple[int, int]]:
        position = 0
        for start, end in sorted(span for batch, span in self._spans.items() if batch not in spare):
            yield position, start
            position = end
        yield position, self.nbytes


def room_sizes(batch_bytes: Sequence[int]) -> list[int]:
    """The room that each batch takes: its pages, or as much as a slightly larger batch takes.

    Layers often differ by the page that their tensors start in. Were they given exactly what they need, the gaps
    between them would drift, until a gap that is a page too small costs a whole layer.
    """
    pages = [round_up(nbytes, PAGE_BYTES) for nbytes in batch_bytes]
    rooms: dict[int, int] = {}
    room = 0
    for size in sorted(set(pages), reverse=True):
        room = room if room and size > (1 - ALIKE) * room else size
        rooms[size] = room
    return [rooms[size] for size in pages]


def ring_bytes(batch_bytes: Sequence[int], depth: int) -> int:
    """The smallest ring in which `depth` batches that follow each other always find room, first after last included.

    That is the largest sum of `depth` neighbours, and more only where batches of different sizes would leave gaps that
    none of them fits; at most all batches together.
    """
    sizes = room_sizes(batch_bytes)
    depth = min(depth, len(sizes))
    if not sizes:
        return 0
    window = max(sum((sizes + sizes)[start : start + depth]) for start in range(len(sizes)))
    differences = {abs(a - b) for a in set(sizes) for b in set(sizes)}
    gaps = {count * gap for gap in differences | set(sizes) for count in range(depth + 1)}
    candidates = (window + gap for gap in sorted(gaps) if window + gap < sum(sizes))
    return next((nbytes for nbytes in candidates if _never_stuck(nbytes, sizes, depth)), sum(sizes))


def _never_stuck(nbytes: int, sizes: Sequence[int], depth: int) -> bool:
    """Whether a cyclic walk that holds one batch and reads `depth - 1` ahead always finds room for each.

    The walk is over once it is in a state that it was in before.
    """
    ring, count = Ring(nbytes), len(sizes)
    live: list[int] = []
    seen = set()
    while True:
        for step in range(count):
            ahead = [(step + distance) % count for distance in range(depth)]
            spare = [batch for batch in live if batch not in ahead]
            for batch in ahead:
                if batch not in live:
                    placed = ring.place(batch, sizes[batch], spare)
                    if placed is None:
                        return False
                    live = [other for other in live if other not in placed[1]] + [batch]
        state = tuple(sorted(ring._spans.items()))
        if state in seen:
            return True
        seen.add(state)
