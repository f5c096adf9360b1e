"""The streamer brings layer batches through a ring of memory: it reads ahead, and hands them out when they are needed.

The streamer executes; it decides nothing. Which layers form a batch, how large the ring is and how far to read ahead
is in the plan. It knows no model: `lease` gives the memory of a batch, while the next ones are being read; when the
lease ends, the next read that fits starts at once, wrapping from last to first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch

from airstream.errors import CLOSED, AirstreamError, ClosedError, UnsupportedError
from airstream.layout.ring import Ring, room_sizes
from airstream.reporting.stats import ReadClock
from airstream.streaming.fill import Fill, Filling
from airstream.streaming.lease import Lease
from airstream.streaming.order import AccessOrder
from airstream.streaming.region import Region
from airstream.streaming.room import RoomChanged, no_room
from airstream.system.forks import FORKED_INSIDE, Forks
from airstream.transfer.jobs import ReadCancelled
from airstream.transfer.machinery import Machinery


class Streamer:
    """Brings layer batches, as `fills` say, through a ring of `ring_bytes` on the device, up to `prefetch` ahead.

    With `prefetch=0` nothing is read before it is asked for: the synchronous path. What a batch keeps in memory comes
    along when the batch is first read; a batch that has nothing left to stream is then no longer read ahead. `order` is
    that in which to begin, until another one is observed: as they are listed, if it is not given.

    Peak device bytes: `ring_bytes`. Reads run on the reader's threads. All methods may be called from any thread, and
    any thread may hold several leases.
    """

    def __init__(
        self,
        fills: Sequence[Fill],
        ring_bytes: int,
        prefetch: int,
        machinery: Machinery,
        order: Sequence[int] | None = None,
    ) -> None:
        self.fills = fills
        self.stats = machinery.stats
        self._probe = machinery.probe
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
        self._changed = RoomChanged()
        self._reading = ReadClock(self.stats)
        self._is_inside = False
        self._closed = False
        self._forks = Forks()

    def start(self) -> None:
        """Begin to read ahead."""
        self._is_inside = True
        with self._changed.lock:
            self._read_ahead()
        self._is_inside = False

    def lease(self, batch: int) -> Lease:
        """The memory of `batch`, filled. Blocks until its bytes are there (or, on a device, on their way).

        Raises:
            ReadError: they could not be read; the next call tries again.
            ClosedError: the streamer was closed.
            BudgetError: the ring has no room for it beside leases that nobody could give back any more.
        """
        if listener := self._probe.listener:
            listener.begin_wait()
        self.check_open()
        self._is_inside = True
        try:
            region = self._asked_for(batch)
        except AirstreamError:  # raised where nothing is half done, unlike an interrupt
            self._is_inside = False
            raise
        self._is_inside = False
        self._backend.wait_filled(self._fences[batch])
        if listener:
            listener.waited(region.read_bytes, region.host_bytes)
            region.read_bytes = region.host_bytes = 0
        return Lease(region, self._end)

    def _asked_for(self, batch: int) -> Region:
        """The region of `batch`, filled, with one user more."""
        region: Region | None = None
        with self._changed.lock:
            self._order.observe(batch)
            self.stats.acquired += 1
            self.stats.missed += batch not in self._regions and not self.fills[batch].is_complete
            if (stale := self._regions.get(batch)) and not stale.holds_batch:
                self._drop(batch)  # reading ahead failed; now that it is needed, the disk may have recovered
        while True:
            with self._changed.lock:
                self.check_open()
                if region is None and (region := self._join(batch)) is not None:
                    joined = time.perf_counter()
                if region is not None and not region.filling:
                    self.stats.stall_seconds += time.perf_counter() - joined
                    if region.error is None:
                        return region
                    self._leave(region, threading.get_ident())
                    if not isinstance(region.error, ReadCancelled):
                        raise region.error
                    region = None  # given up for another thread: read again
                    continue
                ticket = self._changed.ticket()
            self._changed.wait(ticket)

    def _join(self, batch: int) -> Region | None:
        """The region of `batch`, which this thread is a user of from now on; None while there is no room for it."""
        if batch not in self._regions and not self._begin(batch, self._spare(keep=()), urgent=True):
            if not self._give_up_one():
                self._ask_for_room(batch)
            return None
        region = self._regions[batch]
        region.users.append(threading.get_ident())  # before anything else is read, which would take its place
        self._read_ahead()
        return region

    def _end(self, lease: Lease) -> None:
        if self._forks.is_child:
            return lease.forget()  # it was taken in another process
        self._backend.mark_computed()
        was_inside, self._is_inside = self._is_inside, True
        with self._changed.lock:
            self._leave(lease.region, lease.thread)
            lease.forget()
            if not self._closed:
                self._read_ahead()
            self._changed.call()
        self._is_inside = was_inside
        return None

    def _leave(self, region: Region, thread: int) -> None:
        """One use of `region` by `thread` is over."""
        if thread in region.users:  # an interrupt may have come behind that already
            region.users.remove(thread)
        is_over = not region.users and self.fills[region.batch].is_complete  # nor will it be asked for again
        if self._regions.get(region.batch) is region and (is_over or not region.holds_batch):
            self._drop(region.batch)  # there is nothing in it, whoever else has waited for it

    def upcoming(self) -> list[int]:
        """Every batch, in the order in which it is going to be asked for."""
        return self._order.upcoming()

    def wait_until_quiet(self) -> None:
        """Block until nothing that has been begun is under way, neither reads nor copies."""
        self._changed.until(self._fills_nothing)  # it knows of reads; the backend knows of pinning and copies
        self._backend.wait_pinned()
        self._backend.synchronize()

    def _fills_nothing(self) -> bool:
        # One without work, here where nothing is being begun, was interrupted while it was: nobody fills it.
        return not any(each.filling and each.work for each in self._regions.values())

    def after_fork(self) -> None:
        """In a forked child: what was being read never arrives here. The ring is empty; its memory stays."""
        self._forks, self._changed = Forks(), RoomChanged()
        self._forget()

    def recover(self, is_in_doubt: bool = False) -> None:
        """Where nobody holds a lease: read anew what an interrupt has left, or all, if it `is_in_doubt`. May block."""
        if self._closed or self._forks.is_child:
            return
        with self._changed.lock:
            self._is_inside |= is_in_doubt or any(region.users for region in self._regions.values())
        if self._is_inside:
            self._reader.wait_until_idle()
            with self._changed.lock:
                self._forget()
                self._changed.call()

    def _forget(self) -> None:
        self._regions.clear()
        self._ring = Ring(self._ring.nbytes)
        self._reading = ReadClock(self.stats)
        self._is_inside = False

    def close(self) -> None:
        """Stop reading and give the ring back. Idempotent; blocks for reads under way. Waiting calls raise."""
        if self._forks.is_child:
            self.after_fork()
        with self._changed.lock:
            self._closed = True
            for region in self._regions.values():
                if region.work is not None:
                    region.work.cancel()
            self._changed.call()
        self._changed.until(self._fills_nothing)
        with self._changed.lock:
            self._regions.clear()
        self._backend.synchronize()
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def check_open(self) -> None:
        """Raise if it is closed, or if what is asked for would be read in another process."""
        if self._forks.is_child:
            raise UnsupportedError(FORKED_INSIDE)
        if self._closed:
            raise ClosedError(CLOSED)

    def _read_ahead(self) -> None:
        """Start reading what comes next, nearest first, as far as there is room."""
        coming = (batch for batch in self._order.upcoming() if not self.fills[batch].is_complete)
        upcoming = list(islice(coming, self._prefetch))
        for batch in upcoming:
            if batch not in self._regions and not self._begin(batch, self._spare(upcoming)):
                return

    def _ask_for_room(self, batch: int) -> None:
        """A lease has to end. Raises if those who hold one wait for room themselves."""
        in_use = [region for region in self._regions.values() if region.users and self._rooms[region.batch]]
        if self._changed.is_hopeless({thread for region in in_use for thread in region.users}):
            held = {region.batch: self._rooms[region.batch] for region in in_use}
            raise no_room(batch, self._rooms[batch], self._ring.nbytes, held)

    def _spare(self, keep: Sequence[int]) -> list[int]:
        """Batches whose places may be taken: whatever nobody uses, and `keep` does not name. None if all have room."""
        if self._all_fit:
            return []
        spare = (r.batch for r in self._regions.values() if not r.users and not r.filling and r.batch not in keep)
        return [batch for batch in spare if self._rooms[batch]]

    def _begin(self, batch: int, spare: Sequence[int], urgent: bool = False) -> bool:
        """Start reading `batch` if there is room, in place of batches in `spare` if need be."""
        fill, offset = self.fills[batch], 0
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
        """Have one read come to its end that nobody waits for, the last needed first. False if there is none."""
        unwanted = (r for r in reversed(self._regions.values()) if r.filling and not r.users and self._rooms[r.batch])
        if (region := next(unwanted, None)) is None:
            return False
        if region.work is not None:
            region.work.cancel()
        return True

    def _drop(self, batch: int) -> None:
        del self._regions[batch]
        if self.fills[batch].room:
            self._ring.free(batch)
        self._report_ring()

    def _report_ring(self) -> None:
        if listener := self._probe.listener:
            listener.ring_holds(sum(self._rooms[batch] for batch in self._regions))

    def _filled(self, region: Region, read_bytes: int, error: BaseException | None) -> None:
        """All reads of `region` have ended; called by a reader thread."""
        with self._changed.lock:
            region.error, region.work = error, None  # the work refers to this region: a cycle would outlive close()
            try:
                if error is None:
                    self._backend.end_fill(self._fences[region.batch])
                    if read_bytes:
                        self.stats.streamed_bytes += read_bytes
                        self.stats.source = self._reader.source
                    self.stats.host_bytes += self.fills[region.batch].hosted_bytes
            except BaseException as raised:  # a device's: whoever waits for the batch has to see it
                region.error = raised
            region.filling = False
            if read_bytes:
                self._reading.count(-1)
            if isinstance(error, ReadCancelled) and not region.users and self._regions.get(region.batch) is region:
                self._drop(region.batch)
            self._changed.call()
