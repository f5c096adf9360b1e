"""This reads one file at given positions, with or without the page cache.

Direct reads (O_DIRECT) are for a model that does not fit in memory: they cost a tenth of the CPU time of buffered ones
and leave the page cache to others. Where a file system refuses them, or there is no such thing, reads are buffered.
A file may be closed between two reads and opened again; if it is then another one, that is an error.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
from pathlib import Path

from airstream.errors import AirstreamError, BudgetError, CheckpointError, CheckpointNotFoundError, ReadError
from airstream.reporting.units import counted
from airstream.transfer.descriptors import Descriptors

PAGE_BYTES = 4096
"""What direct reads want offsets, lengths and addresses to be multiples of."""

SECTOR_BYTES = 512
"""Of the smallest disks' blocks: a direct read that stops anywhere else has met the end of the file."""

HAS_PREADV = hasattr(os, "preadv")  # everywhere but on Windows
_BINARY = getattr(os, "O_BINARY", 0)


def failure_of(what: str, error: OSError | MemoryError) -> AirstreamError:
    """The error to raise where `what`, which is reading or opening a file, was answered by `error`."""
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return BudgetError(
            f"{what} failed: the system has no memory left for it. Load the model with a smaller max_memory, or end "
            "what else uses memory"
        )
    return ReadError(f"{what} failed: {error.strerror or error}")


class WeightFile:
    """A file of weights. Reads are positioned, so that threads share it.

    Args:
        descriptors: keeps it open, and may close it between two reads to open others; without, it stays open.

    Attributes:
        direct: True if reads go around the page cache and must be page-aligned in offset, length and address. It turns
            False for good when the file system refuses that, which may be while a read is under way: whoever plans a
            read asks once.
    """

    def __init__(self, path: Path, direct: bool, descriptors: Descriptors | None = None) -> None:
        self.path = path
        self.direct = direct and hasattr(os, "O_DIRECT")
        self._lock = threading.Lock()
        self._descriptors = descriptors or Descriptors()
        self._identity: tuple[int, int, int] | None = None
        self._avoids_cache = direct
        with self._descriptors.of(self):
            pass  # so that a missing one is known now

    def read_into(self, view: memoryview, offset: int, needed: int) -> None:
        """Read the bytes at `offset` into `view`, at least the first `needed` of them. Blocks, without the GIL.

        Only a direct read needs less than it asks for: the last page of a file may be a partial one.

        Raises:
            ReadError: the disk failed, or the file has ended before `needed` bytes.
            CheckpointError: another file has been put in its place.
            BudgetError: the system has no memory for it.
        """
        try:
            self._read_all(view, offset, needed)
        except AirstreamError:
            raise
        except (OSError, MemoryError) as error:
            raise failure_of(self._range(offset, needed), error) from error

    def _read_all(self, view: memoryview, offset: int, needed: int) -> None:
        done = 0
        while done < needed:
            was_direct = self.direct  # by the time that it is refused, another thread may have fallen back
            try:
                count = self._read_some(view[done:], offset + done)  # EINTR is retried inside (PEP 475)
            except OSError as error:
                if error.errno == errno.EINVAL and was_direct:  # some file systems refuse only now
                    self._fall_back()
                    continue
                raise
            done += count
            if done < needed and self.direct:
                done -= count % SECTOR_BYTES  # a direct read cannot go on from within one
                count -= count % SECTOR_BYTES
            if count == 0:
                raise ReadError(f"{self._range(offset, needed)} failed: the file ends after {done:,} of them")
        with self._descriptors.of(self) as descriptor:  # a microsecond: somebody may have written into it
            self._check_identity(os.fstat(descriptor))
        if self._avoids_cache and not self.direct:
            self._drop_from_cache(offset, needed)

    def after_fork(self) -> None:
        """In a forked child: a thread that does not exist here may have held the lock."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file. Idempotent; no read may be under way."""
        self._descriptors.close(self)

    def open_descriptor(self) -> int:
        """Open the file: for the first time, or again. For `Descriptors`.

        Raises:
            CheckpointNotFoundError: it is not there.
            CheckpointError: it is there, but not the file that it was when it was first opened.
            ReadError: it cannot be opened.
        """
        return self._opened(self.direct)

    def _opened(self, direct: bool) -> int:
        try:
            descriptor = self._open(direct)
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"shard {self.path} is missing. Download the checkpoint again") from None
        except (OSError, MemoryError) as error:
            raise failure_of(f"opening {self.path}", error) from error
        try:
            self._check_identity(os.fstat(descriptor))
            if self._avoids_cache and sys.platform == "darwin":
                import fcntl

                fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open(self, direct: bool) -> int:
        flags = os.O_RDONLY | _BINARY
        if direct:
            try:
                return os.open(self.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what refuses: overlays, some network disks
                    raise
            self.direct = False
        return os.open(self.path, flags)

    def _check_identity(self, status: os.stat_result) -> None:
        """The first file that was opened is the right one; from then on, no other is."""
        identity = (status.st_ino, status.st_size, status.st_mtime_ns)
        self._identity = self._identity or identity
        if identity != self._identity:
            raise CheckpointError(
                f"{self.path} is not the file that was opened when the model was loaded: it has been replaced or "
                "changed meanwhile. Load the model again"
            )

    def _fall_back(self) -> None:
        """Go on through the page cache. The descriptor stays the same, for the reads that other threads are in."""
        with self._descriptors.of(self) as descriptor, self._lock:
            if self.direct:
                buffered = self._opened(direct=False)
                os.dup2(buffered, descriptor, inheritable=False)
                os.close(buffered)
                self.direct = False  # only now: until here, other threads' reads have to be aligned

    def _drop_from_cache(self, offset: int, nbytes: int) -> None:
        """The next best thing where direct reads are refused: leave little behind in the page cache."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), self._descriptors.of(self) as descriptor:  # it is no more than advice
                os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _read_some(self, view: memoryview, offset: int) -> int:
        with self._descriptors.of(self) as descriptor:
            if HAS_PREADV:
                return os.preadv(descriptor, [view], offset)
            with self._lock:  # Windows: one file position for all threads
                os.lseek(descriptor, offset, os.SEEK_SET)
                data = os.read(descriptor, len(view))
        view[: len(data)] = data
        return len(data)

    def _range(self, offset: int, nbytes: int) -> str:
        return f"reading {counted(nbytes, 'byte')} at {offset:,} of {self.path}"


class EdgePages:
    """Direct reads of ranges that do not start or end on a page: inner pages directly, the edges through a page."""

    def __init__(self) -> None:
        self._page: memoryview | None = None  # until the first read, which can say so if there is no memory

    def read_direct(self, file: WeightFile, window: memoryview, offset: int, nbytes: int) -> None:
        """Read the `nbytes` at `offset` into `window`, whose address equals `offset` modulo the page size.

        Or, if `window` is larger, into their place in it: it is room for all pages that they touch.
        """
        if len(window) > nbytes:
            skip = offset % PAGE_BYTES
            file.read_into(window, offset - skip, skip + nbytes)
            return
        end = offset + len(window)
        inner_start, inner_end = -(-offset // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES
        if inner_start > inner_end:  # all within one page
            self._read_edge(file, window, offset)
            return
        self._read_edge(file, window[: inner_start - offset], offset)
        if inner_end > inner_start:
            file.read_into(window[inner_start - offset : inner_end - offset], inner_start, inner_end - inner_start)
        self._read_edge(file, window[inner_end - offset :], inner_end)

    def _read_edge(self, file: WeightFile, part: memoryview, offset: int) -> None:
        if not len(part):
            return
        skip = offset % PAGE_BYTES
        page = self._page = self._page or memoryview(mmap.mmap(-1, PAGE_BYTES))
        file.read_into(page, offset - skip, skip + len(part))
        part[:] = page[skip : skip + len(part)]
