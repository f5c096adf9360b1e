"""This writes the files that users name, each whole or not at all, and takes the place of nothing but files.

A link is followed to what it leads to. Devices of characters (/dev/null), this process's own streams (/dev/stdout) and
pipes without a name (what a shell makes of `>(gzip)`) are written to as they are; whatever else is no file is refused.

It knows what lies under a name. It refuses to know what is written.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from airstream.errors import ArgumentError, DiskSpaceError
from airstream.reporting.kinds import kind_of, what_lies


def check_output(file: Path) -> None:
    """Refuse a file that cannot be written, before any work goes into what it is to hold.

    Raises:
        ArgumentError: it is neither absent nor a file, or there is no such folder.
    """
    _find(file)


@contextmanager
def written(file: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become `file` when the block ends without an error. What is there stays until then.

    Raises:
        ArgumentError: as `check_output`, or it may not be written.
        DiskSpaceError: the disk is full.
    """
    target, is_straight = _find(file)
    try:
        if is_straight:
            with _straight(target) as out:
                yield out
            return
        scratch = target.with_name(f".{os.getpid()}-{threading.get_ident()}.partial")  # short, whatever its own name
        try:
            with scratch.open("wb") as out:
                yield out
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
    except BrokenPipeError:  # who reads has gone
        raise
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
            raise ArgumentError(f"{file} cannot be written: {error.strerror}. Name a file in another folder") from None
        raise DiskSpaceError(f"{file} could not be written: {error.strerror}. Name a file on another disk") from error


def _find(file: Path) -> tuple[Path, bool]:
    """Where `file` leads, and whether that is written to as it is, not replaced."""
    target = Path(os.path.realpath(file))
    try:
        there = file.stat()
    except FileNotFoundError:
        folder = target.parent if file.is_symlink() else file.parent
        if not target.parent.is_dir():
            raise ArgumentError(f"{file} cannot be written: there is no folder {folder}") from None
        return target, False
    except (OSError, RuntimeError) as error:
        reason = f"it is {lies}" if (lies := what_lies(file)) else getattr(error, "strerror", None) or error
        raise ArgumentError(f"{file} cannot be written: {reason}. Name another file") from error
    mode = there.st_mode
    is_unnamed = stat.S_ISFIFO(mode) and not os.path.lexists(target)
    if is_unnamed or stat.S_ISCHR(mode) or _own(there) is not None:
        return file, True
    if not stat.S_ISREG(mode):
        raise ArgumentError(f"{file} cannot be written: it is {kind_of(mode)}. Name another file")
    return target, False


def _own(there: os.stat_result) -> int | None:
    """The descriptor of this process's standard output or error that `there` is."""
    for descriptor in (1, 2):
        with suppress(OSError):  # closed by who started this
            if os.path.samestat(there, os.fstat(descriptor)):
                return descriptor
    return None


@contextmanager
def _straight(file: Path) -> Iterator[BinaryIO]:
    own = _own(file.stat())
    if own is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    with os.fdopen(os.open(file, os.O_WRONLY) if own is None else os.dup(own), "wb") as out:
        yield out
