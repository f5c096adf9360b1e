"""A fill brings the bytes of a layer batch to where it computes: from disk each time or once, or from host memory.

It knows reads and copies and when all of them are done. It refuses to know the ring, the order of batches, and who
waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import torch

from airstream.layout.slab import Slab
from airstream.transfer.base import Backend, HostedMemory
from airstream.transfer.crossing import Crossing
from airstream.transfer.jobs import Job, OnDone
from airstream.transfer.piece import Landing, Piece
from airstream.transfer.reader import Reader


@dataclass(slots=True, eq=False)
class Resident:
    """Tensors that are loaded once and stay on the device that computes.

    Attributes:
        memory: the bytes of the tensors, as a uint8 tensor on the device.
        loaded: the bytes are there, or on their way behind the fence of the batch that brought them.
        converted: whoever has to make something of the bytes in place has done so.
    """

    slab: Slab
    memory: torch.Tensor
    loaded: bool = False
    converted: bool = False

    def convert_once(self, convert: Callable[[Slab, torch.Tensor], None]) -> None:
        """Have `convert` make of the bytes, which have just been loaded, what they are to be. Once."""
        if not self.converted:
            self.loaded = False  # an interrupt leaves neither the one nor the other
            convert(self.slab, self.memory)
            self.converted = self.loaded = True


@dataclass(slots=True, eq=False)
class Hosted:
    """Tensors that are loaded once into host memory, as they are stored, and cross to the device every time.

    Attributes:
        slab: what is read into `memory`.
        crossings: by the name of each tensor, what crosses; targets count from its first byte.
    """

    slab: Slab
    crossings: Mapping[str, Sequence[Crossing]]
    memory: HostedMemory
    loaded: bool = False

    @property
    def crossing_bytes(self) -> int:
        """The bytes that cross every time."""
        return sum(crossing.nbytes for crossings in self.crossings.values() for crossing in crossings)


@dataclass(frozen=True, slots=True)
class Fill:
    """A fill says what has to come before a layer batch can compute.

    Attributes:
        slab: the tensors that pass through the ring; none if all of the batch stays.
        room: the bytes that the slab takes in the ring.
        resident: the tensors that stay on the device.
        hosted: the part of `slab` that comes from host memory.
        kept: by name, what stays on the device packed, as tensors, of which another part of `slab` is made.
    """

    slab: Slab
    room: int
    resident: Sequence[Resident] = ()
    hosted: Sequence[Hosted] = ()
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether nothing has to come any more, ever."""
        return not self.slab.nbytes and all(resident.loaded for resident in self.resident)

    @property
    def loaded_once(self) -> Iterator[Resident | Hosted]:
        """The tensors that do not come from disk a second time."""
        return chain(self.resident, self.hosted)

    @property
    def to_read_bytes(self) -> int:
        """The bytes that come from disk the next time."""
        return self.slab.read_bytes + sum(once.slab.read_bytes for once in self.loaded_once if not once.loaded)

    @property
    def hosted_bytes(self) -> int:
        """The bytes that come from host memory each time."""
        return sum(hosted.crossing_bytes for hosted in self.hosted)


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
        for resident in fill.resident:
            if not resident.loaded:
                self._read(resident.slab.pieces, backend.landing(resident.memory), partial(_mark_loaded, resident))
        for hosted in fill.hosted:
            send = partial(self._send, hosted, memory, _crossings(fill.slab, hosted))
            if hosted.loaded:
                send()
            else:
                self._read(hosted.slab.pieces, hosted.memory.landing(), partial(_mark_loaded, hosted, send))
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

    def _send(self, hosted: Hosted, memory: torch.Tensor, crossings: Sequence[Crossing]) -> None:
        errands = hosted.memory.send(memory, crossings)
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


def _mark_loaded(once: Resident | Hosted, then: Callable[[], None] | None = None) -> None:
    once.loaded = True
    if then is not None:
        then()


def _crossings(slab: Slab, source: Hosted) -> list[Crossing]:
    """What crosses from `source` to memory that is laid out as `slab`."""
    return [
        replace(crossing, target=slab.offsets[name] + crossing.target)
        for name, crossings in source.crossings.items()
        for crossing in crossings
    ]
