"""This makes paths of what users name files and folders with. It knows what no system takes, and opens nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from airstream.errors import ArgumentError


def path_of(name: str, value: object) -> Path:
    """`value`, which is an argument called `name`, as a path; nothing need be there.

    Raises:
        ArgumentError: nothing can be called that.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        raise ArgumentError(f"{name}={value!r} is not the name of a file or a folder")
    try:
        path = Path(text).expanduser()
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ArgumentError(f"{name}={text[:60]!r}... is longer than names may be") from error
    except (ValueError, RuntimeError) as error:  # it has a zero byte, or is of a home that is nowhere
        raise ArgumentError(f"{name}={value!r} is not the name of a file or a folder: {error}") from error
    return path
