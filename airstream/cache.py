"""Where airstream keeps what it made, and how a folder is made exactly once.

Knows folders, locks, manifests and free space. Refuses to know what the folders hold, and never deletes a complete one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from airstream.errors import DiskSpaceError
from airstream.units import format_bytes

__all__ = ["cache_folder", "is_complete", "make_once", "sync"]

MANIFEST = "airstream-manifest.json"


def cache_folder() -> Path:
    """`$AIRSTREAM_CACHE`, or the platform's own folder for what a program can make again. It may not exist yet."""
    if chosen := os.environ.get("AIRSTREAM_CACHE"):
        return Path(chosen).expanduser().absolute()
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
        DiskSpaceError: fewer than `peak_bytes` are free.
    """
    if is_complete(folder, recipe):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if is_complete(folder, recipe):  # another process made it while this one waited for the lock
            return folder
        prefix = f".{folder.name}-making-"
        for leftover in folder.parent.glob(f"{prefix}*"):  # whoever held the lock was killed
            shutil.rmtree(leftover, ignore_errors=True)
        _check_free_space(folder, peak_bytes)
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


def is_complete(folder: Path, recipe: str) -> bool:
    """Whether `folder` was made by `recipe` and its files still have their sizes. Reads the manifest, not the files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(manifest, dict) or manifest.get("recipe") != recipe:
        return False
    sizes = manifest.get("files")
    return isinstance(sizes, dict) and sizes.items() <= _file_sizes(folder).items()


def _seal(folder: Path, recipe: str) -> None:
    """Put the files of `folder` on the disk, then the manifest that vouches for them."""
    sizes = _file_sizes(folder)
    for name in sizes:
        sync(folder / name)
    manifest = json.dumps({"recipe": recipe, "files": sizes}, indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _file_sizes(folder: Path) -> dict[str, int]:
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


def _check_free_space(folder: Path, peak_bytes: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < peak_bytes:
        raise DiskSpaceError(
            f"making {folder} needs {format_bytes(peak_bytes)} of disk; {format_bytes(free)} are free. "
            "Free some, or set AIRSTREAM_CACHE to a folder on another disk."
        )
