"""A manifest is what a repacked checkpoint says of itself: what it was made from, and the checksum of every file.

It knows the two files of that: the manifest in a finished checkpoint, the journal in an unfinished one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from airstream.checkpoint.names import MANIFEST
from airstream.errors import CheckpointError, CheckpointNotFoundError
from airstream.system.foreign_json import MANIFEST as MANIFEST_KIND
from airstream.system.foreign_json import read_json
from airstream.transfer.files import failure_of

JOURNAL = "airstream-unfinished.json"
FORMAT = 1
SAMPLE_BYTES = 64 << 10


def fingerprint(files: Iterable[Path]) -> list[dict[str, Any]]:
    """What tells files from others: their names, sizes, times, and a checksum of their first and last 64 KiB.

    Raises:
        CheckpointNotFoundError, ReadError: one is gone, or cannot be read.
    """
    return [_fingerprint(file) for file in files]


def _fingerprint(file: Path) -> dict[str, Any]:
    with _reading(file) as stream:
        status = os.fstat(stream.fileno())
        digest = hashlib.sha256(stream.read(SAMPLE_BYTES))
        stream.seek(max(0, status.st_size - SAMPLE_BYTES))
        digest.update(stream.read(SAMPLE_BYTES))
    return {
        "name": file.name,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256_of_ends": digest.hexdigest(),
    }


@contextmanager
def _reading(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{file} is missing. Download the checkpoint again") from None
    except OSError as error:
        raise failure_of(f"reading {file}", error) from error


def digest_of(recipe: Mapping[str, Any]) -> str:
    """A name for what is to be made: the same for the same source, layers and files."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a repacked checkpoint; None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    return _read(folder / MANIFEST)


def read_journal(folder: Path) -> dict[str, Any] | None:
    """What an unfinished repack says of itself; None if it cannot be read, which makes it worthless."""
    try:
        return _read(folder / JOURNAL)
    except CheckpointError:
        return None


def write_json(file: Path, contents: Mapping[str, Any]) -> None:
    """Put `contents` into `file`, on the disk, whole or not at all."""
    part = file.with_name(file.name + ".part")
    with part.open("w", encoding="utf-8") as stream:
        json.dump(contents, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        contents = read_json(file, MANIFEST_KIND)
        files = contents["files"]
        if contents["format"] != FORMAT or not all(
            type(entry["bytes"]) is int and type(entry["sha256"]) is str and Path(name).name == name
            for name, entry in files.items()
        ):
            raise ValueError("it is of another version, or damaged")
    except CheckpointNotFoundError:
        return None
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not the manifest of a repacked checkpoint ({error!r})") from None
    return contents
