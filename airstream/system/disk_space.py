"""This holds what is about to be written against what is free and how large a file may be.

If a disk refuses meanwhile, the error says why, and what helps.

It knows free space, limits of a file's size, and the errors of a disk that has no room. It refuses to know what is
written.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from airstream.errors import AirstreamError, DiskSpaceError
from airstream.reporting.units import format_bytes

QUOTA = getattr(errno, "EDQUOT", errno.ENOSPC)
FULL = (errno.ENOSPC, QUOTA, errno.EFBIG)
"""The disk is full, or the part of it that belongs to the user, or a file may not become larger."""

RAISE_LIMIT = "Raise that limit (`ulimit -f unlimited`)"


def check_free_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuse to write `needed` bytes into `folder` if they are not free.

    Raises:
        DiskSpaceError: the message has both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(f"{what} needs {format_bytes(needed)} of disk; {format_bytes(free)} are free. {remedy}")


def check_file_size(largest: int, what: str, other: str = "") -> None:
    """Refuse to write a file of `largest` bytes where this process may not (`ulimit -f`).

    Args:
        other: what helps besides a higher limit.

    Raises:
        DiskSpaceError: the message has both numbers.
    """
    limit = file_limit()
    if limit is not None and limit < largest:
        raise DiskSpaceError(
            f"{what} writes a file of {format_bytes(largest)}, and this process may write none above "
            f"{format_bytes(limit)}. {RAISE_LIMIT}{other}"
        )


def file_limit() -> int | None:
    """Bytes that a file of this process may have; None where the system sets no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


@contextmanager
def named_when_full(folder: Path, needed: Callable[[], int], what: str, remedy: str) -> Iterator[None]:
    """Whatever is written inside, into `folder`, and finds no room is a DiskSpaceError, whichever call it was.

    Args:
        needed: the bytes that are missing, asked for when they are.
    """
    try:
        yield
    except AirstreamError:
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = f"{what} needs {format_bytes(needed())} more, {format_bytes(shutil.disk_usage(there).free)} are free"
        raise DiskSpaceError(f"{_refusal(error, there)}: {free}. {remedy_for(error.errno or 0, remedy)}") from error


def _refusal(error: OSError, there: Path) -> str:
    if error.errno == errno.EFBIG:
        limit = file_limit()
        how = "the file system does not take it" if limit is None else f"{format_bytes(limit)} at most, by `ulimit -f`"
        return f"a file in {there} may not become so large ({how})"
    if error.errno == QUOTA != errno.ENOSPC:
        return f"your quota on the disk of {there} is used up"
    return f"the disk of {there} is full"


def remedy_for(code: int, remedy: str) -> str:
    """What helps against an error `code` of `FULL`: `remedy`, unless it is one file that is too large."""
    if code != errno.EFBIG:
        return remedy
    return f"{RAISE_LIMIT}, or name a folder on another disk" if file_limit() is not None else "Name another disk"
