"""This opens files that others wrote without waiting, and reads them only as far as they may go.

It knows what can be opened. A pipe, a device or a folder under the name of a file is refused, where opening it would
wait for ever or do whatever a device does.
"""

from __future__ import annotations

import mmap
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from airstream.errors import CheckpointError, CheckpointNotFoundError
from airstream.reporting.kinds import kind_of
from airstream.reporting.units import counted
from airstream.system.impostors import complaint

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def open_regular(file: Path) -> BinaryIO:
    """`file`, open for reading. Never waits for a writer.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is not a file, or cannot be opened.
    """
    try:
        _check_regular(file, file.stat().st_mode)  # before it is opened: to open a device may do something
        descriptor = os.open(file, _FLAGS)
        try:
            _check_regular(file, os.fstat(descriptor).st_mode)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{file} is missing. Download the checkpoint again") from None
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise unreadable(file, error) from error


def read_regular(file: Path, max_bytes: int, what: str) -> bytes:
    """All of `file`, which is no larger than `what` ever is.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `open_regular`, or it is larger.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise CheckpointError(
                f"{file} has {counted(size, 'byte')}: it is not {what}, which has {max_bytes:,} at most"
            )
        try:
            return stream.read(max_bytes)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


@contextmanager
def mapped(file: Path) -> Iterator[mmap.mmap]:
    """All bytes of `file`, mapped into memory for reading.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `open_regular`, or the system does not map it.
    """
    with open_regular(file) as stream:
        try:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # there is nothing to map
            raise CheckpointError(complaint(file, b"", "")) from None
        except (OSError, MemoryError) as error:  # some network disks map nothing
            reason = getattr(error, "strerror", None) or "no memory is left"
            raise CheckpointError(f"{file} cannot be mapped into memory: {reason}. Copy it to a local disk") from error
    with data:
        yield data


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be listed, or in which no file can be opened.

    Raises:
        CheckpointError: the message says how that is changed.
    """
    try:
        os.scandir(folder).close()
        os.stat(os.path.join(folder, os.curdir))  # noqa: PTH116, PTH118 - a Path leaves out the dot
    except PermissionError as error:
        raise unreadable(folder, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """What to raise because `error` has come of reading `path`."""
    reason = getattr(error, "strerror", None) or str(error)
    remedy = (
        f". chmod -R u+rX {shlex.quote(str(path))} allows it to its owner" if isinstance(error, PermissionError) else ""
    )
    return CheckpointError(f"{str(path)[:500]!a} cannot be read: {reason}{remedy}")


def _check_regular(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{file} is {kind_of(mode)}, not a file: refused")
