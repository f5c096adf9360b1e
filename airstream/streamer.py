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
from typing import Any

import torch

from airstream.backend.base import Backend
from airstream.checkpoint.reader import Job, ReadCancelled, Reader
from airstream.errors import ClosedError
from airstream.order import AccessOrder
from airstream.ring import Ring, room_sizes
from airstream.slab import Slab


@dataclass(slots=True)
class Region:
    """A layer batch in the ring.

    Attributes:
        memory: its bytes on the device, a uint8 tensor.
        offset: where in the ring it lies.
        fresh: True after a fill; whoever makes something of the bytes in place, once, sets it to False.
        filling: reads are under way.
        users: calls that wait for it, or compute with it. Without any, it stays intact until its place is needed.
        error: what kept it from being filled.
    """

    batch: int
    offset: int
    memory: torch.Tensor
    fresh: bool = True
    filling: bool = True
    users: int = 0
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
        self._rooms = room_sizes([slab.nbytes for slab in slabs])
        self._all_fit = sum(self._rooms) <= ring_bytes
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
            region = self._use(batch)
        self._backend.wait_filled(self._fences[batch])
        return region

    def release(self, batch: int) -> None:
        """The last computation with `batch` has been submitted: its place may be reused. Does not block."""
        self._backend.release()
        with self._changed:
            region = self._regions.get(batch)
            if region is not None and region.users:
                region.users -= 1
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
            while any(region.filling for region in self._regions.values()):
                self._changed.wait()
            self._regions.clear()
        self._backend.synchronize()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the model is closed: load it again with from_pretrained()")

    def _use(self, batch: int) -> Region:
        """The region of `batch`, filled, with one user more."""
        stale = self._regions.get(batch)
        if stale is not None and stale.error is not None and not stale.users:
            self._drop(batch)  # reading ahead failed; now that it is needed, the disk may have recovered
        while True:
            region = self._regions.get(batch) or self._read_now(batch)
            region.users += 1  # before anything else is read, which would take its place
            self._read_ahead()
            self._wait_until_filled(region)
            if region.error is None:
                return region
            region.users -= 1
            if not region.users and self._regions.get(batch) is region:
                self._drop(batch)
            if not isinstance(region.error, ReadCancelled):  # given up for another thread: read again
                raise region.error

    def _read_ahead(self) -> None:
        """Start reading what comes next, nearest first, as far as there is room."""
        upcoming = self._order.upcoming(self._prefetch)
        for batch in upcoming:
            if batch not in self._regions and not self._begin(batch, self._spare(upcoming)):
                return

    def _read_now(self, batch: int) -> Region:
        """Start reading `batch` ahead of everything else, at the cost of what was read ahead if need be."""
        while batch not in self._regions:
            self._check_open()
            if not self._begin(batch, self._spare(keep=()), urgent=True) and not self._give_up_one():
                self._changed.wait()  # other threads use the whole ring
        return self._regions[batch]

    def _spare(self, keep: Sequence[int]) -> list[int]:
        """Batches whose places may be taken: whatever nobody uses, and `keep` does not name. None if all have room."""
        if self._all_fit:
            return []
        regions = self._regions.values()
        return [r.batch for r in regions if not r.users and not r.filling and r.batch not in keep]

    def _begin(self, batch: int, spare: Sequence[int], urgent: bool = False) -> bool:
        """Start reading `batch` if there is room, in place of batches in `spare` if need be."""
        slab = self._slabs[batch]
        placed = self._ring.place(batch, self._rooms[batch], spare)
        if placed is None:
            return False
        offset, lost = placed
        for other in lost:
            del self._regions[other]
        region = Region(batch, offset, self._memory[offset : offset + slab.nbytes])
        self._regions[batch] = region
        self._count_reading(+1)
        self._backend.begin_fill()
        landing = self._backend.landing(region.memory)
        region.job = self._reader.submit(slab.pieces, landing, lambda error: self._filled(region, error), urgent)
        return True

    def _give_up_one(self) -> bool:
        """Make an end of one read that nobody waits for, the last needed first. False if there is none."""
        region = next((r for r in reversed(self._regions.values()) if r.filling and not r.users), None)
        if region is None:
            return False
        if region.job is not None:
            region.job.cancel()
        while region.filling:
            self._changed.wait()
        if not region.users and self._regions.get(region.batch) is region:
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
            region.filling = False
            self._count_reading(-1)
            self._changed.notify_all()

    def _wait_until_filled(self, region: Region) -> None:
        started = time.perf_counter()
        while region.filling:
            self._changed.wait()
        self.stats.stall_seconds += time.perf_counter() - started
        self._check_open()

    def _count_reading(self, change: int) -> None:
        now = time.perf_counter()
        if self._num_reading:
            self.stats.read_seconds += now - self._reading_since
        self._reading_since = now
        self._num_reading += change
