"""The streamer brings layer batches through a ring of memory: it reads ahead, and hands them out when they are needed.

The streamer executes; it decides nothing. Which layers form a batch, how large the ring is and how far to read ahead
is in the plan. It knows no model: `acquire` gives the memory of a batch, while the next ones are being read; `release`
takes it back, and the next read that fits starts at once, wrapping from last to first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch

from airstream.errors import ClosedError, UnsupportedError
from airstream.layout.ring import Ring, room_sizes
from airstream.reporting.stats import LinkMeter, MeasuredLink, ReadClock
from airstream.streaming.fill import Fill, Filling
from airstream.streaming.order import AccessOrder
from airstream.streaming.region import Region
from airstream.system.forks import FORKED_INSIDE, Forks
from airstream.transfer.jobs import ReadCancelled
from airstream.transfer.machinery import Machinery


class Streamer:
    """Brings layer batches, as `fills` say, through a ring of `ring_bytes` on the device, up to `prefetch` ahead.

    With `prefetch=0` nothing is read before it is asked for: the synchronous path. What a batch keeps in memory comes
    along when the batch is first read; a batch that has nothing left to stream is then no longer read ahead. `order` is
    that in which to begin, until another one is observed: as they are listed, if it is not given.

    Peak device bytes: `ring_bytes`. Reads run on the reader's threads. All methods may be called from any thread.
    """

    def __init__(
        self,
        fills: Sequence[Fill],
        ring_bytes: int,
        prefetch: int,
        machinery: Machinery,
        order: Sequence[int] | None = None,
    ) -> None:
        self.stats = machinery.stats
        self._probe = machinery.probe
        self._fills = fills
        self._prefetch = prefetch
        self._reader = machinery.reader
        self._backend = backend = machinery.backend
        self._memory = backend.allocate(ring_bytes)
        self._ring = Ring(ring_bytes)
        self._rooms = room_sizes([fill.room for fill in fills])
        self._all_fit = sum(self._rooms) <= ring_bytes
        self._order = AccessOrder(order or range(len(fills)))
        self._regions: dict[int, Region] = {}
        self._fences: list[Any] = [backend.new_fence() for _ in fills]
        self._changed = threading.Condition()
        self._reading = ReadClock(self.stats)
        self._is_inside = False
        self._closed = False
        self._forks = Forks()

    def start(self) -> None:
        """Begin to read ahead."""
        with self._changed:
            self._read_ahead()

    def acquire(self, batch: int) -> Region:
        """The memory of `batch`, filled. Blocks until its bytes are there (or, on a device, on their way).

        Raises ReadError if they could not be read (the next call tries again), ClosedError if the streamer was closed.
        """
        if listener := self._probe.listener:
            listener.begin_wait()
        self.check_open()
        self._is_inside = True
        with self._changed:
            self.check_open()
            self._order.observe(batch)
            self.stats.acquired += 1
            self.stats.missed += batch not in self._regions and not self._fills[batch].is_complete
            region = self._use(batch)
        self._is_inside = False
        self._backend.wait_filled(self._fences[batch])
        if listener:
            listener.waited(region.read_bytes, region.host_bytes)
            region.read_bytes = region.host_bytes = 0
        return region

    def release(self, batch: int) -> None:
        """The last computation with `batch` has been submitted: its place may be reused. Does not block."""
        if self._forks.is_child:
            return  # it was acquired in another process
        self._backend.release()
        was_inside, self._is_inside = self._is_inside, True
        with self._changed:
            region = self._regions.get(batch)
            if region is not None and region.users:
                region.users -= 1
                if not region.users and self._fills[batch].is_complete:
                    self._drop(batch)  # it will not be asked for again, and has nothing to give up
            if not self._closed:
                self._read_ahead()
            self._changed.notify_all()
        self._is_inside = was_inside

    def measure_link(self) -> MeasuredLink:
        """Stream every batch once without computing: from when nothing moves until nothing moves any more.

        What is loaded just once, and what has been read ahead, is out of the way first, so that it does not count; what
        is read ahead at the end does instead. Blocks for all of that, copies to the device included.
        """
        for batch, fill in enumerate(self._fills):
            if any(not once.loaded for once in fill.loaded_once):
                self._pass_through(batch)
        self.start()
        streamed = [batch for batch, fill in enumerate(self._fills) if fill.slab.nbytes]
        first = next((streamed.index(batch) for batch in self._order.upcoming() if batch in streamed), 0)
        self._wait_until_quiet()
        meter = LinkMeter(self.stats)
        for batch in (*streamed[first:], *streamed[:first]):
            self._pass_through(batch)
        self._wait_until_quiet()
        return meter.measured()

    def _wait_until_quiet(self) -> None:
        """Block until nothing that has been begun is under way, neither reads nor copies."""
        with self._changed:
            self._wait_for_fills()  # it knows of reads; the backend knows of pinning and copies
        self._backend.settle()
        self._backend.synchronize()

    def _wait_for_fills(self) -> None:
        # One without work, here where nothing is being begun, was interrupted while it was: nobody fills it.
        self._changed.wait_for(lambda: not any(each.filling and each.work for each in self._regions.values()))

    def _pass_through(self, batch: int) -> None:
        self.acquire(batch)
        self.release(batch)

    def after_fork(self) -> None:
        """In a forked child: what was being read never arrives here. The ring is empty; its memory stays."""
        self._forks, self._changed = Forks(), threading.Condition()
        self._forget()

    def recover(self) -> None:
        """After an interrupt, which may come anywhere: read anew what was begun, if that is in doubt. Blocks."""
        if self._is_inside and not self._closed and not self._forks.is_child:
            self._reader.wait_until_idle()
            with self._changed:
                self._forget()

    def _forget(self) -> None:
        self._regions.clear()
        self._ring = Ring(self._ring.nbytes)
        self._reading = ReadClock(self.stats)
        self._is_inside = False

    def close(self) -> None:
        """Stop reading and give the ring back. Idempotent; blocks for reads under way. Waiting calls raise."""
        if self._forks.is_child:
            self.after_fork()
        with self._changed:
            self._closed = True
            for region in self._regions.values():
                if region.work is not None:
                    region.work.cancel()
            self._changed.notify_all()
            self._wait_for_fills()
            self._regions.clear()
        self._backend.synchronize()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def check_open(self) -> None:
        """Raise if it is closed, or if what is asked for would be read in another process."""
        if self._forks.is_child:
            raise UnsupportedError(FORKED_INSIDE)
        if self._closed:
            raise ClosedError("the model is closed: load it again with from_pretrained()")

    def _use(self, batch: int) -> Region:
        """The region of `batch`, filled, with one user more."""
        if (stale := self._regions.get(batch)) and stale.error is not None and not stale.users:
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
        upcoming = self._upcoming()
        for batch in upcoming:
            if batch not in self._regions and not self._begin(batch, self._spare(upcoming)):
                return

    def _upcoming(self) -> list[int]:
        """What to read ahead: the next batches that anything has to come for."""
        return list(islice((b for b in self._order.upcoming() if not self._fills[b].is_complete), self._prefetch))

    def _read_now(self, batch: int) -> Region:
        """Start reading `batch` ahead of everything else, at the cost of what was read ahead if need be."""
        while batch not in self._regions:
            self.check_open()
            if not self._begin(batch, self._spare(keep=()), urgent=True) and not self._give_up_one():
                self._changed.wait()  # other threads use the whole ring
        return self._regions[batch]

    def _spare(self, keep: Sequence[int]) -> list[int]:
        """Batches whose places may be taken: whatever nobody uses, and `keep` does not name. None if all have room."""
        if self._all_fit:
            return []
        regions = self._regions.values()
        spare = (r for r in regions if not r.users and not r.filling and r.batch not in keep)
        return [r.batch for r in spare if self._rooms[r.batch]]

    def _begin(self, batch: int, spare: Sequence[int], urgent: bool = False) -> bool:
        """Start reading `batch` if there is room, in place of batches in `spare` if need be."""
        fill, offset = self._fills[batch], 0
        if fill.room:
            if (placed := self._ring.place(batch, self._rooms[batch], spare)) is None:
                return False
            offset, lost = placed
            for other in lost:
                del self._regions[other]
        region = Region(batch, offset, self._memory[offset : offset + fill.slab.nbytes])
        region.read_bytes, region.host_bytes = fill.to_read_bytes, fill.hosted_bytes
        self._regions[batch] = region
        self._report_ring()
        if region.read_bytes:
            self._reading.count(+1)
        self._backend.begin_fill()
        on_done = partial(self._filled, region, region.read_bytes)
        work = Filling(fill, region.memory, self._reader, self._backend, on_done, urgent)
        region.work = work if region.filling else None
        return True

    def _give_up_one(self) -> bool:
        """Make an end of one read that nobody waits for, the last needed first. False if there is none."""
        unwanted = (r for r in reversed(self._regions.values()) if r.filling and not r.users and self._rooms[r.batch])
        if (region := next(unwanted, None)) is None:
            return False
        if region.work is not None:
            region.work.cancel()
        while region.filling:
            self._changed.wait()
        if not region.users and self._regions.get(region.batch) is region:
            self._drop(region.batch)
        return True

    def _drop(self, batch: int) -> None:
        del self._regions[batch]
        if self._fills[batch].room:
            self._ring.free(batch)
        self._report_ring()

    def _report_ring(self) -> None:
        if listener := self._probe.listener:
            listener.ring_holds(sum(self._rooms[batch] for batch in self._regions))

    def _filled(self, region: Region, read_bytes: int, error: BaseException | None) -> None:
        """All reads of `region` have ended; called by a reader thread."""
        with self._changed:
            region.error, region.work = error, None  # the work refers to this region: a cycle would outlive close()
            try:
                if error is None:
                    self._backend.end_fill(self._fences[region.batch])
                    if read_bytes:
                        self.stats.streamed_bytes += read_bytes
                        self.stats.source = self._reader.source
                    self.stats.host_bytes += self._fills[region.batch].hosted_bytes
            except BaseException as raised:  # a device's: whoever waits for the batch has to see it
                region.error = raised
            region.filling = False
            if read_bytes:
                self._reading.count(-1)
            self._changed.notify_all()

    def _wait_until_filled(self, region: Region) -> None:
        started = time.perf_counter()
        self._changed.wait_for(lambda: not region.filling)
        self.stats.stall_seconds += time.perf_counter() - started
        self.check_open()
