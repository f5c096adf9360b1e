"""The disk's raw rate: how fast the files of a checkpoint can be read when nothing is done with the bytes.

    python -m benchmarks.disk FILE... [--gb 3] [--threads 4]

Large sequential reads past the page cache (O_DIRECT) from a few threads. No system that streams weights from this disk
can be faster than bytes over this rate, so every comparison states it, from the same minutes.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock

NUM_THREADS = 4
CHUNK_BYTES = 8 << 20  # a multiple of every disk's block, which O_DIRECT asks for

Span = tuple[int, int]  # file descriptor, offset


def read_rate(files: Sequence[Path], max_bytes: float = 3e9, num_threads: int = NUM_THREADS) -> float:
    """Bytes per second of reading `files` in order, each to its end or until `max_bytes` are read. Blocks.

    Peak host memory: one 8 MiB buffer a thread.

    Raises:
        ValueError: the files are empty, so there is no rate.
    """
    with ExitStack() as stack:
        descriptors = [_open_direct(file) for file in files]
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        next_span = _shared(_spans(descriptors, max_bytes))
        start = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            workers = [pool.submit(_read_spans, next_span) for _ in range(num_threads)]
        total = sum(worker.result() for worker in workers)
        elapsed = time.perf_counter() - start
    if total == 0:
        raise ValueError(f"nothing to read in {len(files)} files")
    return total / elapsed


def _open_direct(file: Path) -> int:
    """Open past the page cache; where the file system refuses, forget the file's cached pages and read through it."""
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return descriptor


def _spans(descriptors: Sequence[int], max_bytes: float) -> Iterator[Span]:
    """One span for each chunk, file after file."""
    planned = 0
    for descriptor in descriptors:
        for offset in range(0, os.fstat(descriptor).st_size, CHUNK_BYTES):
            if planned >= max_bytes:
                return
            planned += CHUNK_BYTES
            yield descriptor, offset


def _shared(spans: Iterator[Span]) -> Callable[[], Span | None]:
    """`next` for several threads: a generator must not be entered twice at once."""
    lock = Lock()

    def next_span() -> Span | None:
        with lock:
            return next(spans, None)

    return next_span


def _read_spans(next_span: Callable[[], Span | None]) -> int:
    total = 0
    with _buffer() as buffer:
        while span := next_span():
            descriptor, offset = span
            total += os.preadv(descriptor, [buffer], offset)
    return total


def _buffer() -> mmap.mmap:
    """Memory that a disk can be read into directly: page aligned, touched, and in huge pages.

    Python's default, shared memory in small pages, more than halved the rate of one virtual disk (1.0 instead of 2.4).
    """
    buffer = mmap.mmap(-1, CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages: ordinary ones do
        buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer.write(bytes(CHUNK_BYTES))
    return buffer


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rate of reading the files named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--gb", type=float, default=3.0, help="how much to read at most")
    parser.add_argument("--threads", type=int, default=NUM_THREADS)
    args = parser.parse_args(argv)
    print(f"{read_rate(args.files, args.gb * 1e9, args.threads) / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
