"""This knows where airstream keeps what it made, and makes a folder exactly once.

It knows folders, locks, manifests and free space. It refuses to know what the folders hold, and never deletes a
complete one.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from airstream.errors import CheckpointError, DiskSpaceError
from airstream.reporting.paths import path_of
from airstream.system.disk_space import check_free_space, named_when_full
from airstream.system.foreign_json import MANIFEST as MANIFEST_KIND
from airstream.system.foreign_json import read_json

__all__ = ["cache_folder", "file_sizes", "is_complete", "make_once", "sync"]

MANIFEST = "airstream-manifest.json"
ELSEWHERE = "Free some, or set AIRSTREAM_CACHE to a folder on another disk."

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""What systems say of a folder in which nothing can be made: of another user, read-only, or a file."""

_MAKING = "-making-"
_WORK_FOLDER = re.compile(rf"\.(?P<folder>.+){_MAKING}[^-]+")


def cache_folder() -> Path:
    """`$AIRSTREAM_CACHE`, or the platform's own folder for what a program can make again. It may not exist yet."""
    if chosen := os.environ.get("AIRSTREAM_CACHE"):
        return path_of("AIRSTREAM_CACHE", chosen).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "airstream"
    variable, fallback = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    return Path(os.environ.get(variable) or Path.home() / fallback).absolute() / "airstream"


def make_once(folder: Path, recipe: str, build: Callable[[Path, Path], None], peak_bytes: int) -> Path:
    """`folder`, made by `build` unless it is already complete. Blocks while another process makes the same folder.

    `build(made, scratch)` fills the empty folder `made`, which takes its final name only when it is whole and on the
    disk; `scratch` is a folder for whatever else it writes. If `build` raises (Ctrl-C included), both are deleted.

    Args:
        folder: the final name; its parent is created.
        recipe: what `folder` was made from and how. A folder made by another recipe is made again.
        peak_bytes: the most that `made` and `scratch` hold together.

    Raises:
        DiskSpaceError: fewer than `peak_bytes` are free, the disk filled up meanwhile, or nothing can be written there.
    """
    with named_when_full(folder, lambda: peak_bytes, f"making {folder}", ELSEWHERE):
        try:
            made = _make_once(folder, recipe, build, peak_bytes)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise DiskSpaceError(
                f"{folder.parent}, where {folder.name} would be kept, cannot be written ({error.strerror}): set "
                "AIRSTREAM_CACHE to a folder that can be"
            ) from error
        _sweep(folder.parent)
    return made


def _make_once(folder: Path, recipe: str, build: Callable[[Path, Path], None], peak_bytes: int) -> Path:
    if is_complete(folder, recipe):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _try_to_write(folder.parent)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if is_complete(folder, recipe):  # another process made it while this one waited for the lock
            return folder
        prefix = f".{folder.name}{_MAKING}"
        for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):  # whoever held the lock was killed
            shutil.rmtree(leftover, ignore_errors=True)
        check_free_space(folder.parent, peak_bytes, f"making {folder}", ELSEWHERE)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as work:
            made, scratch = Path(work, "made"), Path(work, "scratch")
            made.mkdir()
            scratch.mkdir()
            build(made, scratch)
            _seal(made, recipe)
            if os.path.lexists(folder):  # incomplete, or of another recipe: a folder cannot be replaced, only renamed
                folder.replace(Path(work, "replaced"))
            made.replace(folder)
        sync(folder.parent)
    return folder


def _try_to_write(folder: Path) -> None:
    """Raise where no file can be made: a lock there would be waited for without end."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileNotFoundError as error:  # what some file systems of the kernel say
        raise PermissionError(errno.EACCES, "no file can be made there") from error


def _sweep(parent: Path) -> None:
    """Delete what makers of folders in `parent` have left that were killed, wherever they were. Waits for nobody.

    A maker holds the lock of its folder as long as it lives.
    """
    for leftover in parent.glob(f".*{_MAKING}*"):
        name = _WORK_FOLDER.fullmatch(leftover.name)
        if name is None:
            continue
        with suppress(Timeout, OSError), FileLock(parent / f".{name['folder']}.lock", timeout=0):
            shutil.rmtree(leftover, ignore_errors=True)


def is_complete(folder: Path, recipe: str) -> bool:
    """Whether `folder` was made by `recipe` and its files still have their sizes. Reads the manifest, not the files."""
    manifest = _read_manifest(folder)
    sizes = manifest.get("files")
    return manifest.get("recipe") == recipe and isinstance(sizes, dict) and sizes.items() <= file_sizes(folder).items()


def sizes_vouched_for(folder: Path) -> dict[str, int]:
    """The sizes of the files that were in `folder` when it was complete, by name; none if nobody says."""
    sizes = _read_manifest(folder).get("files")
    is_sound = isinstance(sizes, dict) and all(isinstance(size, int) for size in sizes.values())
    return sizes if isinstance(sizes, dict) and is_sound else {}


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / MANIFEST, MANIFEST_KIND)
    except CheckpointError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _seal(folder: Path, recipe: str) -> None:
    """Put the files of `folder` on the disk, then the manifest that vouches for them."""
    sizes = file_sizes(folder)
    for name in sizes:
        sync(folder / name)
    manifest = json.dumps({"recipe": recipe, "files": sizes}, indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def file_sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of every file directly in `folder`, the manifest aside."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != MANIFEST}


def sync(path: Path) -> None:
    """Block until the file or folder `path` is on the disk, so that a power cut cannot leave a name without bytes."""
    if path.is_dir() and sys.platform == "win32":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
