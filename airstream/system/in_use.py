"""This says of a packed copy in the cache folder that it is in use, and whether it is, and remembers when it last was.

Who uses one holds a shared lock on an empty file beside it for as long as that lasts; the time of that file is that of
the last use. Who wants to remove one asks for the lock alone, and waits for nobody. The system gives up the locks of a
process that ends, however it does. Windows has no such locks, and removes no file that is open.

It knows the names of these files. It refuses to know what is in a copy, and how one is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from airstream.errors import ArgumentError
from airstream.system.cache import cache_folder

__all__ = ["claimed", "hold", "is_taken", "last_use", "lock_of", "packed_folder", "using"]

PACKED_FOLDER = "packed"
"""In the cache folder."""


def packed_folder() -> Path:
    """Where packed copies lie."""
    return cache_folder() / PACKED_FOLDER


def last_use(copy: Path) -> float | None:
    """When `copy` was last taken into use, in seconds as `time.time`; None if nobody has, or nobody knows."""
    try:
        return _beside(copy).stat().st_mtime
    except OSError:
        return None


def hold(folder: Path) -> Callable[[], None]:
    """From now on `folder` is in use, if it is a packed copy, until what is returned is called, however often.

    Of other folders nothing is said. Waits for who is removing it.
    """
    with suppress(OSError, ArgumentError):  # who may not write there cannot say it, and uses it all the same
        if folder.absolute().parent == packed_folder():
            file = _beside(folder).open("ab")
            os.utime(_beside(folder))
            _lock(file, alone=False)
            return file.close
    return lambda: None


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """While this lasts, as `hold`."""
    release = hold(folder)
    try:
        yield
    finally:
        release()


@contextmanager
def claimed(copy: Path) -> Iterator[bool]:
    """Whether nobody uses `copy`; then nobody begins to while this lasts."""
    with _beside(copy).open("ab") as file:
        try:
            _lock(file, alone=True)
            is_free = True
        except OSError:  # somebody does, or it cannot be known
            is_free = False
        yield is_free


def is_taken(copy: Path) -> bool:
    """Whether somebody uses `copy` or holds the lock of those who make it. Writes nothing; False if nobody knows."""
    return any(_is_locked(file) for file in (_beside(copy), lock_of(copy)))


def lock_of(copy: Path) -> Path:
    """The file that is locked by who makes `copy`, or removes it."""
    return copy.absolute().with_name(f".{copy.name}.lock")


def _is_locked(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            _lock(opened, alone=True)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock(file: BinaryIO, alone: bool) -> None:
    """Lock `file` with others, which may be waited for; or `alone`, at once or not at all.

    Raises:
        OSError: not at all.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)


def _beside(copy: Path) -> Path:
    return copy.absolute().with_name(f".{copy.name}.used")
