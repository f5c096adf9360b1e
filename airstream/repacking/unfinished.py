"""This says what may lie where a repack is under way, in a hidden folder: nothing, or what a run before has left.

All else in there is removed when a repack goes on. So what no repack has made is refused. It writes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from airstream.checkpoint.names import MANIFEST
from airstream.errors import ArgumentError
from airstream.repacking.manifest import JOURNAL

__all__ = ["begin_folder", "what_is_in_the_way"]

OWN_NAMES = (JOURNAL, f"{JOURNAL}.part", MANIFEST)
"""A folder in which a repack is under way has one of them, unless it is empty."""


def begin_folder(work: Path) -> None:
    """Make the folder `work`, unless a run before has left it.

    Raises:
        ArgumentError: something else has that name.
    """
    if what := what_is_in_the_way(work):
        raise ArgumentError(f"{work}, in which a repack would be made, is {what}: remove it, or name another folder")
    work.mkdir(exist_ok=True)


def what_is_in_the_way(work: Path) -> str:
    """What `work` is, if no repack can have left it; else nothing. No link is followed."""
    if os.path.islink(work):  # noqa: PTH114 - a Path raises where it may not look
        return "a link"
    try:
        with os.scandir(work) as entries:
            folders = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except NotADirectoryError:
        return "no folder"
    except OSError:  # there is nothing, or whoever makes it is told why it cannot be
        return ""
    if inner := next((name for name, is_folder in sorted(folders.items()) if is_folder), None):
        return f"a folder with another one in it, {inner!r}"
    return "a folder that no repack has begun" if folders and not folders.keys() & set(OWN_NAMES) else ""
