"""This measures how fast the disk gives weights: with the engine's reader, read size, threads and kind of memory.

It knows files and free space. Writes nothing beside a checkpoint, and leaves no file behind. It refuses to know
formats: what it reads, it does not look at.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from airstream.errors import ArgumentError, DiskSpaceError
from airstream.rates.effort import Effort
from airstream.reporting.units import format_bytes
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.jobs import Outcome, ReadCancelled
from airstream.transfer.landing import HostLanding, Staging
from airstream.transfer.piece import Piece
from airstream.transfer.reader import CHUNK_BYTES, Reader

__all__ = ["DiskSpeed", "files_to_read", "measure_disk", "read_files"]

SMALLEST_SHARE = 8
"""A test file may shrink to this part of what was wanted where the disk is nearly full."""


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What reading cost.

    Attributes:
        cpu_seconds_per_byte: of this process, in all of its threads.
        direct: whether reads went around the page cache to the end; some file systems refuse that.
        calls_per_second: of what was done meanwhile.
    """

    bytes_per_second: float
    cpu_seconds_per_byte: float
    direct: bool
    calls_per_second: float = 0.0


def measure_disk(folder: Path, effort: Effort) -> DiskSpeed:
    """Read what `folder` holds, or a test file on its file system. Blocks for the time `effort` gives it.

    Raises:
        ArgumentError: there is nowhere to write a test file.
        DiskSpaceError: there is no room for one.
        ReadError: the disk failed.
    """
    with files_to_read(folder, effort) as files:
        return read_files(files, effort)


def read_files(files: Sequence[Path], effort: Effort, meanwhile: Callable[[], object] | None = None) -> DiskSpeed:
    """Read `files`. `meanwhile` is called over and over until the time is up. Raises ReadError: the disk failed."""
    with Reader(files, direct=True) as reader:
        buffer = HostBuffer(effort.ring_bytes)
        buffer.tensor.zero_()  # touched before the clock runs, as the engine's ring is after its first pass
        landing = HostLanding(buffer.tensor, Staging(CHUNK_BYTES))
        return _read(reader, _pieces(files, effort), landing, effort, meanwhile)


def _read(
    reader: Reader,
    pieces: Sequence[Piece],
    landing: HostLanding,
    effort: Effort,
    meanwhile: Callable[[], object] | None,
) -> DiskSpeed:
    """Queue everything, as the engine does, so that the disk never drains; then give up what the time is too short for.

    What was under way at that point is waited for and counts, bytes and seconds.
    """
    outcome = Outcome()
    started, cpu_started = time.perf_counter(), time.process_time()
    job = reader.submit(pieces, landing, outcome)
    calls, has_ended = 0, False
    with contextlib.suppress(ReadCancelled):
        while not has_ended:
            has_ended, more = _spend(outcome, effort.disk_seconds, meanwhile)
            calls += more
            if not has_ended and reader.bytes_read:  # or else so slow that the time is up before the first read
                job.cancel()
                outcome.wait()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return DiskSpeed(reader.bytes_read / seconds, cpu_seconds / reader.bytes_read, reader.direct, calls / seconds)


def _spend(outcome: Outcome, seconds: float, meanwhile: Callable[[], object] | None) -> tuple[bool, int]:
    """Wait for `outcome`, or call `meanwhile`, for so long at most. Whether it has ended, and how many calls."""
    if meanwhile is None:
        return outcome.wait(seconds), 0
    calls, end = 0, time.perf_counter() + seconds
    while not (has_ended := outcome.wait(0)) and time.perf_counter() < end:
        meanwhile()
        calls += 1
    return has_ended, calls


def _pieces(files: Sequence[Path], effort: Effort) -> list[Piece]:
    """`effort.disk_bytes` of whole pages, from `files` in turn and over again, each read landing in place."""
    runs = [
        Piece(file, offset, min(effort.ring_bytes, size - offset), target=0)
        for file, size in ((file, file.stat().st_size // PAGE_BYTES * PAGE_BYTES) for file in files)
        for offset in range(0, size, effort.ring_bytes)
    ]
    pieces: list[Piece] = []
    left = effort.disk_bytes
    for run in cycle(runs):
        if left <= 0:
            break
        pieces.append(run)
        left -= run.nbytes
    return pieces


@contextlib.contextmanager
def files_to_read(folder: Path, effort: Effort) -> Iterator[list[Path]]:
    """The weights in `folder` if there are enough of them, else a test file that lasts as long as the context."""
    weights = sorted(folder.glob("*.safetensors"))
    if sum(file.stat().st_size for file in weights) >= effort.file_bytes:
        yield weights
    else:
        with _test_file(_place_for_file(folder), effort.file_bytes) as file:
            yield [file]


def _place_for_file(folder: Path) -> Path:
    """A folder on the same file system that can be written, and holds no checkpoint: nothing is put beside one."""
    device = folder.stat().st_dev
    for place in (folder, *folder.resolve().parents, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            same = place.stat().st_dev == device
            if same and os.access(place, os.W_OK) and not any(place.glob("*.safetensors")):
                return place
    raise ArgumentError(
        f"the disk of {folder} cannot be measured: no folder there can be written, and it holds too few weights to "
        "read. Name a folder on the same disk that can be written"
    )


@contextlib.contextmanager
def _test_file(folder: Path, wanted_bytes: int) -> Iterator[Path]:
    """A file in `folder` that the disk really holds: random, written through, gone when the context ends, however."""
    free = shutil.disk_usage(folder).free
    nbytes = min(wanted_bytes, free // 2) // PAGE_BYTES * PAGE_BYTES
    if nbytes < wanted_bytes // SMALLEST_SHARE:
        raise DiskSpaceError(
            f"measuring the disk writes {format_bytes(wanted_bytes // SMALLEST_SHARE)} at least, and leaves as much "
            f"free; in {folder}, {format_bytes(free)} are free. Free some, or name a folder with a checkpoint"
        )
    try:
        descriptor, name = tempfile.mkstemp(prefix=".airstream-disk-test-", dir=folder)
    except OSError as error:
        raise ArgumentError(
            f"{folder} cannot be written ({error.strerror}): name another folder on its disk"
        ) from error
    try:
        _fill(descriptor, nbytes, folder)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _fill(descriptor: int, nbytes: int, folder: Path) -> None:
    """Write `nbytes` that do not compress, and wait until they are on the disk and no longer in the page cache."""
    block = os.urandom(min(nbytes, CHUNK_BYTES))
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for start in range(0, nbytes, len(block)):
                stream.write(block[: nbytes - start])
            stream.flush()
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise DiskSpaceError(f"writing {format_bytes(nbytes)} in {folder} failed: {error.strerror}") from error
