"""This says which checksums of a checkpoint's files are known: from a repack's manifest, or from the hub.

The hub's cache calls a file by its checksum: SHA-256 for those in git-lfs, git's own for small ones. In folders that
were downloaded with `local_dir`, notes beside the files have the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from airstream.reporting.units import counted

SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_SHA1 = re.compile(r"[0-9a-f]{40}")


class Checksum(NamedTuple):
    """What a file should have, and who says so."""

    hexadecimal: str
    said_by: str

    def digest(self, num_bytes: int) -> Any:
        """A fresh hash, to be fed with the `num_bytes` of the file."""
        if SHA256.fullmatch(self.hexadecimal):
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False)  # how git names what it stores


def known_checksums(folder: Path, manifest: Mapping[str, Any] | None) -> dict[Path, Checksum]:
    """The checksums that files in `folder` should have. Files that should be there and are not are named too."""
    known = {}
    for file in sorted(folder.iterdir()):
        found = _of_hub(file) if file.is_file() else None
        if found is not None:
            known[file] = found
    for name, entry in (manifest or {}).get("files", {}).items():
        known[folder / name] = Checksum(entry["sha256"], "the manifest of the repack")
    return known


def wrong_sizes(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """What is wrong with the files of `folder` that should have these `sizes`."""
    there = {name: _size(folder / name) for name in sizes}
    return [
        f"{folder / name} is missing" if size is None else f"{folder / name} has {counted(size, 'byte')}, not {due:,}"
        for name, size, due in ((name, there[name], due) for name, due in sizes.items())
        if size != due
    ]


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _of_hub(file: Path) -> Checksum | None:
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and _is_checksum(blob.name):
        return Checksum(blob.name, "the hub")
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    try:
        lines = note.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return Checksum(lines[1], "the hub") if len(lines) > 1 and _is_checksum(lines[1]) else None


def _is_checksum(text: str) -> bool:
    return bool(SHA256.fullmatch(text) or GIT_SHA1.fullmatch(text))
