"""Getting the bytes of a layer batch to where it computes: from disk every time or just once, or from host memory.

Knows reads and copies and when all of them are done. Refuses to know the ring, the order of batches, and who waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from airstream.layout.slab import Slab
from airstream.transfer.base import Backend, ReadyMemory
from airstream.transfer.jobs import Job, OnDone
from airstream.transfer.reader import Landing, Piece, Reader


@dataclass(slots=True, eq=False)
class Kept:
    """Tensors that are loaded once and stay on the device that computes.

    Attributes:
        memory: their bytes, a uint8 tensor on the device.
        loaded: the bytes are there, or on their way behind the fence of the batch that brought them.
        converted: whoever has to make something of the bytes in place has done so.
    """

    slab: Slab
    memory: torch.Tensor
    loaded: bool = False
    converted: bool = False


@dataclass(slots=True, eq=False)
class Ready:
    """Tensors that are loaded once into host memory and copied from there to the device every time."""

    slab: Slab
    memory: ReadyMemory
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class Fill:
    """What has to come before a layer batch can compute.

    Attributes:
        slab: what passes through the ring; nothing if all of the batch stays.
        room: in the ring, in bytes.
        kept: what stays on the device.
        ready: the part of `slab` that comes from host memory.
    """

    slab: Slab
    room: int
    kept: Sequence[Kept] = ()
    ready: Sequence[Ready] = ()

    @property
    def is_complete(self) -> bool:
        """Whether nothing has to come any more, ever."""
        return not self.slab.nbytes and all(kept.loaded for kept in self.kept)

    @property
    def to_read_bytes(self) -> int:
        """That come from disk the next time."""
        once: list[Kept | Ready] = [*self.kept, *self.ready]
        return self.slab.read_bytes + sum(each.slab.read_bytes for each in once if not each.loaded)

    @property
    def ready_bytes(self) -> int:
        """That come from host memory."""
        return sum(spec.nbytes for ready in self.ready for spec in ready.slab.specs)


class Filling:
    """One fill under way. `on_done` is called once, with None or the first error, when its last byte has landed.

    On an accelerator, landed means that the copy to the device is queued. Does not block.
    """

    def __init__(
        self, fill: Fill, memory: torch.Tensor, reader: Reader, backend: Backend, on_done: OnDone, urgent: bool
    ) -> None:
        self._reader = reader
        self._urgent = urgent
        self._on_done: OnDone | None = on_done
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._open = 1  # this constructor: nothing is done before everything has been begun
        self._jobs: list[Job] = []
        self._read(fill.slab.pieces, backend.landing(memory))
        for kept in fill.kept:
            if not kept.loaded:
                self._read(kept.slab.pieces, backend.landing(kept.memory), partial(_mark_loaded, kept))
        for ready in fill.ready:
            send = partial(self._send, ready, _copies(fill.slab, ready.slab, memory))
            if ready.loaded:
                send()
            else:
                self._read(ready.slab.pieces, ready.memory.landing(), partial(_mark_loaded, ready, send))
        self._end_one(None)

    def cancel(self) -> None:
        """Skip what has not been read yet. `on_done` is still called."""
        for job in self._jobs:
            job.cancel()

    def _read(self, pieces: Sequence[Piece], landing: Landing, then: Callable[[], None] | None = None) -> None:
        if not pieces:
            return
        self._begin_one()
        self._jobs.append(self._reader.submit(pieces, landing, partial(self._ended, then), self._urgent))

    def _send(self, ready: Ready, copies: Sequence[tuple[torch.Tensor, int]]) -> None:
        errands = ready.memory.send(copies)
        if errands:
            self._begin_one()
            self._jobs.append(self._reader.run(errands, partial(self._ended, None), self._urgent))

    def _begin_one(self) -> None:
        with self._lock:
            self._open += 1

    def _ended(self, then: Callable[[], None] | None, error: BaseException | None) -> None:
        if error is None and then is not None:
            try:
                then()
            except BaseException as raised:  # on a reader thread: whoever waits for the batch has to see it
                error = raised
        self._end_one(error)

    def _end_one(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._open -= 1
            if self._open:
                return
        self._jobs.clear()
        on_done, self._on_done = self._on_done, None  # it refers to the region, which refers to this: no cycles
        if on_done is not None:
            on_done(self._error)


def _mark_loaded(once: Kept | Ready, then: Callable[[], None] | None = None) -> None:
    once.loaded = True
    if then is not None:
        then()


def _copies(slab: Slab, source: Slab, memory: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Where in `memory`, laid out as `slab`, each tensor of `source` goes, and where in `source` it starts."""
    return [
        (memory[slab.offsets[spec.name] : slab.offsets[spec.name] + spec.nbytes], source.offsets[spec.name])
        for spec in source.specs
    ]
