"""The reader does many reads at once, straight to where the bytes are needed.

The reader knows files, threads and alignment. It does not know what the bytes mean, nor whether they land in host
memory or, through a staging buffer, on a device: that is the `Landing`'s business.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from airstream.errors import CLOSED, AirstreamError, ClosedError, UnsupportedError
from airstream.reporting.probe import DISK, PAGE_CACHE, Probe
from airstream.reporting.units import counted
from airstream.system.forks import Forks
from airstream.system.waiting import Waiting
from airstream.transfer.descriptors import MAX_OPEN_FILES, Descriptors
from airstream.transfer.files import EdgePages, WeightFile, failure_of
from airstream.transfer.jobs import Errand, Job, OnDone, Outcome, ReadCancelled
from airstream.transfer.piece import Landing, Piece, split
from airstream.transfer.unpacking import blamed_on

CHUNK_BYTES = 8 << 20
"""The largest single read. 4-16 MiB on a few threads keep an NVMe drive busy; larger ones only drain unevenly."""

NUM_WORKERS = 4
"""Reader threads. A read holds no lock and little CPU, so this is the queue depth the disk sees."""


_Step = Callable[[int, "EdgePages"], None]
"""One read or errand, given the reader thread's number and its scratch page."""


class Reader:
    """Worker threads that read pieces of files.

    Args:
        files: the files that may be read; each is opened now, so that a missing one is known.
        direct: go around the page cache where the file system allows it.
        probe: told about every read.
        max_open_files: so many are open at a time; the others are opened again when they are read.
    """

    def __init__(
        self,
        files: Iterable[Path],
        direct: bool,
        num_workers: int = NUM_WORKERS,
        chunk_bytes: int = CHUNK_BYTES,
        probe: Probe | None = None,
        max_open_files: int = MAX_OPEN_FILES,
    ) -> None:
        self.chunk_bytes = chunk_bytes
        self._probe = probe or Probe()
        self.bytes_read = 0
        self._files: dict[Path, WeightFile] = {}
        self._closed = False
        self._begin_anew()
        self._forks = Forks()
        descriptors = Descriptors(max_open_files)
        try:
            for path in files:
                self._files[path] = WeightFile(path, direct, descriptors)
            self._start(num_workers)
        except BaseException:
            self.close()
            raise

    def _start(self, num_workers: int) -> None:
        for number in range(num_workers):
            thread = threading.Thread(target=self._work, args=(number,), name=f"airstream-reader-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise UnsupportedError(
                    f"the system starts no more threads, and {num_workers} are needed to read weights: end other "
                    "programs, or raise the limit (ulimit -u, or that of the container)"
                ) from error
            self._workers.append(thread)

    def _begin_anew(self) -> None:
        self._queue: deque[tuple[Job, _Step]] = deque()
        self._calls: SimpleQueue[None] = SimpleQueue()  # each has a thread look for work
        self._idle = Waiting()
        self._num_busy = 0
        self._workers: list[threading.Thread] = []

    def _forget_parent(self) -> None:
        """In a forked child: threads, locks and whatever waits are the parent's. Files stay: reads are positioned."""
        self._begin_anew()
        for file in self._files.values():
            file.after_fork()

    def _restart(self) -> None:
        num_workers = self.num_workers
        self._forget_parent()
        self._start(0 if self._closed else num_workers)

    @property
    def num_workers(self) -> int:
        """The number of reader threads."""
        return len(self._workers)

    def is_worker(self, thread: threading.Thread) -> bool:
        """Whether `thread` is one of this reader's."""
        return thread in self._workers

    @property
    def direct(self) -> bool:
        """Whether every file is read around the page cache."""
        return all(file.direct for file in self._files.values())

    @property
    def source(self) -> str:
        """The name of what gives the bytes: the disk, or, if any file is read through it, the page cache."""
        return DISK if self.direct else PAGE_CACHE

    def submit(self, pieces: Sequence[Piece], landing: Landing, on_done: OnDone, urgent: bool = False) -> Job:
        """Start reading `pieces`, in order, ahead of all that waits if `urgent`. Does not block."""
        chunks = (chunk for piece in pieces for chunk in split(piece, self.chunk_bytes))
        return self._enqueue([partial(self._read, landing, chunk) for chunk in chunks], on_done, urgent)

    def run(self, errands: Sequence[Errand], on_done: OnDone, urgent: bool = False) -> Job:
        """Have reader threads do `errands`, in order, ahead of all that waits if `urgent`. Does not block."""
        return self._enqueue([partial(_do, errand) for errand in errands], on_done, urgent)

    def _enqueue(self, steps: Sequence[_Step], on_done: OnDone, urgent: bool) -> Job:
        self._forks.restart_in_child(self._restart)
        job = Job(len(steps), on_done)
        with self._idle.lock:
            if self._closed:
                raise ClosedError(CLOSED)
            entries = [(job, step) for step in steps]
            if urgent:
                self._queue.extendleft(reversed(entries))
            else:
                self._queue.extend(entries)
        self._call_workers(len(entries))
        if not steps:
            on_done(None)
        return job

    def _call_workers(self, most: int) -> None:
        """Have threads look for work until there is none. What an interrupt leaves, those do that are called next."""
        for _ in range(min(most, self.num_workers)):
            self._calls.put(None)

    def read(self, pieces: Sequence[Piece], landing: Landing) -> None:
        """Read `pieces` and wait for them. Raises what the reads raised."""
        outcome = Outcome()
        self.submit(pieces, landing, outcome, urgent=True)
        outcome.wait()

    def wait_until_idle(self) -> None:
        """Block until nothing is read, and nothing waits to be. Reader threads must not call this."""
        self._forks.restart_in_child(self._restart)
        self._call_workers(self.num_workers)  # whoever put the last reads in may have been interrupted before it did
        self._idle.until(lambda: not self._queue and not self._num_busy)

    def close(self) -> None:
        """Skip what waits, end the threads, close the files. Idempotent; blocks for the reads under way."""
        self._forks.restart_in_child(self._forget_parent)
        with self._idle.lock:
            self._closed = True
            for job, _ in self._queue:
                job.cancel()
        self._call_workers(self.num_workers)
        for thread in self._workers:
            thread.join()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _work(self, worker: int) -> None:
        edges = EdgePages()
        while not self._closed:
            self._calls.get()
            while (entry := self._take()) is not None:
                job, step = entry
                try:
                    job.finished_one(ReadCancelled() if job.skips else _error_of(step, worker, edges))
                    del entry, job, step  # while this thread waits, it must not keep a slab alive
                finally:
                    self._finished_one()

    def _take(self) -> tuple[Job, _Step] | None:
        with self._idle.lock:
            if not self._queue:
                return None
            self._num_busy += 1
            return self._queue.popleft()

    def _finished_one(self) -> None:
        with self._idle.lock:
            self._num_busy -= 1
            if not self._num_busy and not self._queue:
                self._idle.call()

    def _read(self, landing: Landing, piece: Piece, worker: int, edges: EdgePages) -> None:
        file = self._files[piece.file]
        direct = file.direct  # asked once: the answer may change under way, and decides where the bytes are
        try:
            window = landing.window(worker, piece, direct)
            with self._probe.span(DISK, piece.nbytes):
                if direct:
                    edges.read_direct(file, window, piece.offset, piece.nbytes)
                else:
                    file.read_into(window, piece.offset, piece.nbytes)
            with blamed_on(piece):
                landing.landed(worker, piece, direct)
        except AirstreamError:
            raise
        except (OSError, MemoryError) as error:  # as its file's errors are, those of the memory around it
            what = f"reading {counted(piece.nbytes, 'byte')} at {piece.offset:,} of {piece.file}"
            raise failure_of(what, error) from error
        with self._idle.lock:
            self.bytes_read += piece.nbytes


def _do(errand: Errand, worker: int, _: EdgePages) -> None:
    errand(worker)


def _error_of(step: _Step, worker: int, edges: EdgePages) -> BaseException | None:
    try:
        step(worker, edges)
    except BaseException as error:  # whatever it is, the thread that waits for the job must see it
        return error
    return None
