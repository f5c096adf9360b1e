"""Positioned reads of one file, with or without the page cache.

Direct reads (O_DIRECT) are for a model that does not fit in memory: they cost a tenth of the CPU time of buffered ones
and leave the page cache to others. Where a file system refuses them, or there is no such thing, reads are buffered.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from pathlib import Path

from airstream.errors import CheckpointNotFoundError, ReadError

PAGE_BYTES = 4096
"""What direct reads want offsets, lengths and addresses to be multiples of."""

HAS_PREADV = hasattr(os, "preadv")  # everywhere but on Windows
_BINARY = getattr(os, "O_BINARY", 0)


class WeightFile:
    """An open file of weights. Reads are positioned, so that threads share it.

    Attributes:
        direct: True if reads go around the page cache and must be page-aligned in offset, length and address.
    """

    def __init__(self, path: Path, direct: bool) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._descriptor, self.direct = self._open(direct)
        self._drop_cache = False
        if direct and not self.direct:
            self._avoid_cache()

    def read_into(self, view: memoryview, offset: int, needed: int) -> None:
        """Read the bytes at `offset` into `view`, at least the first `needed` of them. Blocks, without the GIL.

        Only a direct read needs less than it asks for: the last page of a file may be a partial one.

        Raises:
            ReadError: the disk failed, or the file has ended before `needed` bytes.
        """
        done = 0
        while done < needed:
            try:
                count = self._read_some(view[done:], offset + done)  # EINTR is retried inside (PEP 475)
            except OSError as error:
                if error.errno == errno.EINVAL and self.direct:  # some file systems refuse only now
                    self._fall_back()
                    continue
                raise ReadError(f"{self._range(offset, needed)} failed: {error.strerror or error}") from error
            done += count
            if count == 0 or (self.direct and count % 512 and done < needed):  # only the end of a file is off a sector
                raise ReadError(f"{self._range(offset, needed)} failed: the file ends after {done:,} of them")
        if self._drop_cache:
            os.posix_fadvise(self._descriptor, offset, needed, os.POSIX_FADV_DONTNEED)

    def after_fork(self) -> None:
        """In a forked child: a thread that does not exist here may have held the lock."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file. Idempotent; no read may be under way."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _open(self, direct: bool) -> tuple[int, bool]:
        flags = os.O_RDONLY | _BINARY
        try:
            if direct and hasattr(os, "O_DIRECT"):
                try:
                    return os.open(self.path, flags | os.O_DIRECT), True
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what refuses: overlays, some network disks
                        raise
            return os.open(self.path, flags), False
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"shard {self.path} is missing. Download the checkpoint again") from None
        except OSError as error:
            raise ReadError(f"cannot open {self.path}: {error.strerror}") from error

    def _fall_back(self) -> None:
        """Go on through the page cache. The descriptor stays the same, for the reads that other threads are in."""
        with self._lock:
            if self.direct:
                buffered, _ = self._open(direct=False)
                os.dup2(buffered, self._descriptor, inheritable=False)
                os.close(buffered)
                self.direct = False
                self._avoid_cache()

    def _avoid_cache(self) -> None:
        """The next best thing where direct reads are refused: leave little behind in the page cache."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self._descriptor, fcntl.F_NOCACHE, 1)
        self._drop_cache = hasattr(os, "posix_fadvise")

    def _read_some(self, view: memoryview, offset: int) -> int:
        if HAS_PREADV:
            return os.preadv(self._descriptor, [view], offset)
        with self._lock:  # Windows: one file position for all threads
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, len(view))
        view[: len(data)] = data
        return len(data)

    def _range(self, offset: int, nbytes: int) -> str:
        return f"reading {nbytes:,} bytes at {offset:,} of {self.path}"


class EdgePages:
    """Direct reads of ranges that do not start or end on a page: inner pages directly, the edges through a page."""

    def __init__(self) -> None:
        self._page = memoryview(mmap.mmap(-1, PAGE_BYTES))

    def read_direct(self, file: WeightFile, window: memoryview, offset: int) -> None:
        """Fill `window`, whose address equals `offset` modulo the page size, with the bytes at `offset`."""
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
        file.read_into(self._page, offset - skip, skip + len(part))
        part[:] = self._page[skip : skip + len(part)]
