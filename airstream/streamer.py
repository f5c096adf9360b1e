"""Layer batches through a ring of memory: read ahead in the order they will be needed, handed out when they are.

The streamer executes; it decides nothing. Which layers form a batch, how large the ring is and how far to read ahead
is in the plan. It knows no model: `acquire` gives the memory of a batch, `release` takes it back.

    acquire(3) ──► the bytes of batch 3, filled; reads of batches 4, 5, ... already under way
    release(3) ──► its place in the ring is free; the next read that fits starts at once, wrapping from last to first
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch

from airstream.backend.base import Backend
from airstream.checkpoint.reader import Job, ReadCancelled, Reader
from airstream.errors import ClosedError
from airstream.layout import Slab
from airstream.order import AccessOrder
from airstream.ring import Ring


class _State(Enum):
    FILLING = auto()
    READY = auto()  # filled, not asked for yet
    HELD = auto()  # the model computes with it
    SPENT = auto()  # released; intact until its place is needed


@dataclass(slots=True)
class Region:
    """A layer batch in the ring.

    Attributes:
        memory: its bytes on the device, a uint8 tensor.
        offset: where in the ring it lies.
        fresh: True until the first `acquire` after a fill has returned it.
    """

    batch: int
    offset: int
    memory: torch.Tensor
    fresh: bool = True
    state: _State = _State.FILLING
    job: Job | None = None
    error: BaseException | None = None


@dataclass(slots=True)
class StreamStats:
    """What the streamer has done so far.

    Attributes:
        streamed_bytes: read from disk into the ring.
        stall_seconds: wall time in which `acquire` waited for bytes.
        read_seconds: wall time in which at least one batch was being read.
        acquired: batches handed out.
        missed: of those, the ones whose read had not even been started.
    """

    streamed_bytes: int = 0
    stall_seconds: float = 0.0
    read_seconds: float = 0.0
    acquired: int = 0
    missed: int = 0


class Streamer:
    """Streams `slabs` through a ring of `ring_bytes` on the backend's device, up to `prefetch` batches ahead.

    With `prefetch=0` nothing is read before it is asked for: the synchronous path.

    Peak device bytes: `ring_bytes`. Owns no thread of its own: reads run on the reader's threads, and whoever frees
    room in the ring starts the next one. All methods may be called from any thread.
    """

    def __init__(self, slabs: Sequence[Slab], ring_bytes: int, prefetch: int, reader: Reader, backend: Backend) -> None:
        self.stats = StreamStats()
        self._slabs = slabs
        self._prefetch = prefetch
        self._reader = reader
        self._backend = backend
        self._memory = backend.allocate(ring_bytes)
        self._ring = Ring(ring_bytes)
        self._order = AccessOrder(range(len(slabs)))
        self._regions: dict[int, Region] = {}
        self._fences: list[Any] = [backend.new_fence() for _ in slabs]
        self._changed = threading.Condition()
        self._reading_since = 0.0
        self._num_reading = 0
        self._closed = False

    def start(self) -> None:
        """Begin to read ahead."""
        with self._changed:
            self._read_ahead()

    def acquire(self, batch: int) -> Region:
        """The memory of `batch`, filled. Blocks until its bytes are there (or, on a device, on their way).

        Raises:
            ReadError: its bytes could not be read. The next call tries again.
            ClosedError: the streamer was closed.
        """
        with self._changed:
            self._check_open()
            self._order.observe(batch)
            self.stats.acquired += 1
            self.stats.missed += batch not in self._regions
            region = self._filled_region(batch)
            region.state = _State.HELD
        self._backend.wait_filled(self._fences[batch])
        return region

    def release(self, batch: int) -> None:
        """The last computation with `batch` has been submitted: its place may be reused. Does not block."""
        self._backend.release()
        with self._changed:
            region = self._regions.get(batch)
            if region is not None and region.state is _State.HELD:
                region.state, region.fresh = _State.SPENT, False
            if not self._closed:
                self._read_ahead()
            self._changed.notify_all()

    def measure_link(self) -> tuple[int, float]:
        """Stream every batch once without computing. Returns the bytes that passed and the wall seconds they took.

        This is the raw link: what streaming would run at if computation took no time. What has been read ahead is
        drained first, so that it does not count.
        """
        if not self._slabs:
            return 0, 0.0
        batches = range(len(self._slabs))
        for batch in self._order.upcoming(self._prefetch):
            self._pass_through(batch)
        first = self._order.upcoming(1)[0]
        order = [*batches[first:], *batches[:first]]
        started = time.perf_counter()
        for batch in order:
            self._pass_through(batch)
        return sum(self._slabs[batch].read_bytes for batch in batches), time.perf_counter() - started

    def _pass_through(self, batch: int) -> None:
        self.acquire(batch)
        self.release(batch)

    def close(self) -> None:
        """Stop reading and give the ring back. Idempotent; blocks for reads under way. Waiting calls raise."""
        with self._changed:
            self._closed = True
            for region in self._regions.values():
                if region.job is not None:
                    region.job.cancel()
            self._changed.notify_all()
            while any(region.state is _State.FILLING for region in self._regions.values()):
                self._changed.wait()
            self._regions.clear()
        self._backend.synchronize()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _filled_region(self, batch: int) -> Region:
        while True:
            region = self._regions.get(batch) or self._read_now(batch)
            self._read_ahead()
            self._wait_until_filled(region)
            if region.error is None:
                return region
            if self._regions.get(batch) is region:
                self._drop(batch)
            if not isinstance(region.error, ReadCancelled):  # given up for another thread: read again
                raise region.error

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the model is closed: load it again with from_pretrained()")

    def _read_ahead(self) -> None:
        """Start reading what comes next, nearest first, as far as there is room."""
        upcoming = self._order.upcoming(self._prefetch)
        for batch in upcoming:
            if batch not in self._regions and not self._begin(batch, keep=upcoming):
                return

    def _read_now(self, batch: int) -> Region:
        """Start reading `batch` ahead of everything else, at the cost of what was read ahead if need be."""
        while not self._begin(batch, keep=(), urgent=True):
            if not self._give_up_one():
                self._changed.wait()  # another thread holds the ring
                self._check_open()
            if batch in self._regions:
                break  # another thread has started it meanwhile
        return self._regions[batch]

    def _begin(self, batch: int, keep: Sequence[int], urgent: bool = False) -> bool:
        """Start reading `batch` if there is room, evicting spent batches other than `keep`."""
        slab = self._slabs[batch]
        spent = [r.batch for r in self._regions.values() if r.state is _State.SPENT and r.batch not in keep]
        while (offset := self._ring.place(batch, slab.nbytes)) is None:
            if not spent:
                return False
            self._drop(spent.pop(0))
        region = Region(batch, offset, self._memory[offset : offset + slab.nbytes])
        self._regions[batch] = region
        self._count_reading(+1)
        self._backend.begin_fill()
        landing = self._backend.landing(region.memory)
        region.job = self._reader.submit(slab.pieces, landing, lambda error: self._filled(region, error), urgent)
        return True

    def _give_up_one(self) -> bool:
        """Drop one batch that was read ahead, the last needed first. False if all are held."""
        ahead = [region for region in self._regions.values() if region.state in (_State.READY, _State.FILLING)]
        if not ahead:
            return False
        region = ahead[-1]
        if region.job is not None:
            region.job.cancel()
        while region.state is _State.FILLING:
            self._changed.wait()
        if self._regions.get(region.batch) is region:
            self._drop(region.batch)
        return True

    def _drop(self, batch: int) -> None:
        del self._regions[batch]
        self._ring.free(batch)

    def _filled(self, region: Region, error: BaseException | None) -> None:
        """All reads of `region` have ended; called by a reader thread."""
        with self._changed:
            if error is None:
                self._backend.end_fill(self._fences[region.batch])
                self.stats.streamed_bytes += self._slabs[region.batch].read_bytes
            region.error = error
            region.job = None  # it refers to this region: the cycle would keep the ring's memory after close()
            region.state = _State.READY
            self._count_reading(-1)
            self._changed.notify_all()

    def _wait_until_filled(self, region: Region) -> None:
        started = time.perf_counter()
        while region.state is _State.FILLING:
            self._changed.wait()
        self.stats.stall_seconds += time.perf_counter() - started
        self._check_open()

    def _count_reading(self, change: int) -> None:
        now = time.perf_counter()
        if self._num_reading:
            self.stats.read_seconds += now - self._reading_since
        self._reading_since = now
        self._num_reading += change
