"""This says which packed copies are in the cache folder, and removes those that nobody needs, and nothing else.

A copy is known by its name and its manifest, one that is being made by its journal. Of a copy the files go that its
manifest lists; what else lies in its folder stays. It knows no models. Importing it is cheap.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from airstream.checkpoint.names import MANIFEST
from airstream.errors import AirstreamError, ArgumentError, CheckpointError
from airstream.repacking.manifest import read_manifest
from airstream.repacking.unfinished import what_is_in_the_way
from airstream.reporting.alike import nearest
from airstream.system.cache import file_sizes
from airstream.system.in_use import claimed, is_taken, last_use, lock_of, packed_folder

__all__ = ["Copy", "chosen", "copies", "is_made", "remove"]

NAME = re.compile(r"(?P<model>.+)-(?P<codec>[^-]+)-[0-9a-f]{12}")
UNFINISHED = re.compile(r"\.(?P<name>.+)-repacking")


@dataclass(frozen=True, slots=True)
class Copy:
    """One packed copy.

    Attributes:
        folder: where it lies, whole or not.
        name: what it is called once it is whole.
        model: the name of the checkpoint's folder, as far as it is kept.
        nbytes: of its files.
        last_use: when it was last taken into use, or else made; in seconds as `time.time`.
        state: "whole"; "in use", by a model or by whoever makes it; "unfinished", which the next load goes on with;
            "damaged", which the next load makes anew.
    """

    folder: Path
    name: str
    model: str
    codec: str
    nbytes: int
    last_use: float
    state: str


def is_made(folder: Path) -> bool:
    """A repack takes its name when it is whole. Its files may have been damaged, or removed, since: sizes tell."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    sizes = {name: entry["bytes"] for name, entry in (manifest or {}).get("files", {}).items()}
    return bool(sizes) and sizes.items() <= file_sizes(folder).items()


def copies() -> list[Copy]:
    """All packed copies in the cache folder, the one last used first."""
    root = packed_folder()
    found = (_copy(folder) for folder in (root.iterdir() if root.is_dir() else ()))
    return sorted((copy for copy in found if copy is not None), key=lambda copy: -copy.last_use)


def chosen(names: Iterable[str], there: Iterable[Copy]) -> list[Copy]:
    """Those of the copies that are `there` which are called one of `names`, or are of a model called so.

    Raises:
        ArgumentError: none is; the message says which are there.
    """
    there, found = list(there), list[Copy]()
    for name in names:
        named = [copy for copy in there if name in (copy.name, copy.model)]
        if not named:
            meant = nearest(name, [known for copy in there for known in (copy.name, copy.model)])
            guess = f": did you mean {meant!r}?" if meant else f": there are {', '.join(each.name for each in there)}"
            raise ArgumentError(f"no packed copy in {packed_folder()} is called {name!r}{guess if there else ''}")
        found += named
    return list({copy.folder: copy for copy in found}.values())


def remove(copy: Copy) -> bool:
    """Remove `copy`, unless somebody uses or makes it, which is False. What is removed is gone, or is damaged at least.

    Raises:
        AirstreamError: it cannot be removed.
    """
    try:
        with _alone(copy.folder.with_name(copy.name)) as is_alone:
            if is_alone:
                _delete(copy.folder)
            return is_alone
    except PermissionError as error:
        if os.name == "nt":  # one of its files is open
            return False
        raise ArgumentError(f"{copy.folder} cannot be removed: {error.strerror}") from error
    except OSError as error:
        raise ArgumentError(f"{copy.folder} cannot be removed: {error.strerror}") from error


def _copy(folder: Path) -> Copy | None:
    """What `folder` is; None if it is nothing of ours. It may go away meanwhile."""
    hidden = UNFINISHED.fullmatch(folder.name)
    name = hidden["name"] if hidden else folder.name
    match = NAME.fullmatch(name)
    with suppress(OSError):
        manifest = _what_it_says(folder)
        if match is None or manifest is None:
            return None
        codec = manifest.get("codec") or match["codec"]
        state = "unfinished" if hidden else "whole" if is_made(folder) else "damaged"
        state = "in use" if is_taken(folder.with_name(name)) else state
        return Copy(
            folder,
            name,
            model=re.sub(rf"-{re.escape(str(codec))}-[0-9a-f]{{12}}$", "", name),
            codec=str(codec),
            nbytes=sum(file.lstat().st_size for file in folder.iterdir()),
            last_use=last_use(folder.with_name(name)) or folder.stat().st_mtime,
            state=state,
        )
    return None


def _what_it_says(folder: Path) -> Mapping[str, Any] | None:
    """The manifest of a copy; nothing but that it is one of an unfinished copy; None of what is neither."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    if UNFINISHED.fullmatch(folder.name):
        return {} if not what_is_in_the_way(folder) else None
    with suppress(AirstreamError):
        return read_manifest(folder)
    return None


@contextmanager
def _alone(copy: Path) -> Iterator[bool]:
    """Whether nobody makes `copy` or uses it, and while this lasts nobody begins to."""
    lock = FileLock(lock_of(copy), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        with claimed(copy) as is_unused:
            yield is_unused
    finally:
        lock.release()


def _delete(folder: Path) -> None:
    """The manifest last, so that what is left of a copy after an interrupt is still known as one."""
    manifest = _what_it_says(folder)
    if manifest is None:  # somebody else was faster
        return
    listed = manifest.get("files")
    for name in [entry.name for entry in os.scandir(folder)] if listed is None else listed:
        (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    with suppress(OSError):  # there is something in it that is not ours
        folder.rmdir()
