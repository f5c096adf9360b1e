"""Disks that are full: what is about to be written is held against what is free, and a disk that fills up says so.

Knows free space and the errors of a disk that has none. Refuses to know what is written.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from airstream.errors import AirstreamError, DiskSpaceError
from airstream.units import format_bytes

FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)
"""The disk is full, or the part of it that belongs to the user."""


def check_free_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuse to write `needed` bytes into `folder` if they are not free.

    Raises:
        DiskSpaceError: the message has both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(f"{what} needs {format_bytes(needed)} of disk; {format_bytes(free)} are free. {remedy}")


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
        raise DiskSpaceError(
            f"the disk of {there} is full: {what} needs {format_bytes(needed())} more, "
            f"{format_bytes(shutil.disk_usage(there).free)} are free. {remedy}"
        ) from error
