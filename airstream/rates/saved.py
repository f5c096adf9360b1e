"""This keeps measured rates on file: by machine, computing device and file system.

It knows one JSON file in the cache folder. It refuses to know how rates are measured, and never fails a reader: what
cannot be read or understood counts as not measured.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from airstream.errors import CheckpointError
from airstream.rates.facts import LINKS, HardwareFacts, assumed
from airstream.rates.identity import machine_name, usable_cores
from airstream.reporting.kinds import what_lies
from airstream.system.cache import cache_folder
from airstream.system.foreign_json import MANIFEST, read_json

__all__ = ["facts_for", "save", "store_file", "stored"]

FORMAT = 1
"""Of the file. Another one is not read."""

KEY = ("machine", "device", "file_system")
LOCK_SECONDS = 10
"""That a save waits for another one. Either takes milliseconds."""


def store_file() -> Path:
    """Where measured rates are kept. It may not exist yet."""
    return cache_folder() / "hardware.json"


def stored(folder: str | os.PathLike[str], device: torch.device) -> HardwareFacts | None:
    """What was measured on this machine for `device` and the file system of `folder`; None if nothing was.

    Reads one small file. Raises nothing if that, or `folder`, is missing or damaged.
    """
    try:
        wanted = _key(folder, device)
    except OSError:
        return None
    return next((_parsed(entry) for entry in _load() if _key_of(entry) == wanted), None)


def save(folder: str | os.PathLike[str], device: torch.device, facts: HardwareFacts) -> Path:
    """Keep `facts` for `stored`, in place of what was kept for the same key. Returns the file, on disk when it does.

    The file is replaced as a whole: whoever reads it meanwhile, or after a crash, finds the old one or the new one.
    Processes that save at once take turns. What one that was killed has begun, the next one writes over.

    Raises:
        OSError: `folder` is not there, or the cache folder cannot be written.
    """
    key = _key(folder, device)
    entry = {**key, "measured": datetime.date.today().isoformat(), "facts": facts.to_dict()}
    file = store_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock"), timeout=LOCK_SECONDS):
        entries = [entry, *(other for other in _load() if _key_of(other) != key)]
        _replace(file, json.dumps({"format": FORMAT, "machines": entries}, indent=1) + "\n")
    return file


def facts_for(folder: str | os.PathLike[str], device: torch.device) -> HardwareFacts:
    """The best that is known without measuring.

    What is stored; or else the rates of this machine measured with another disk, and an assumed one for this disk; or
    else assumptions. Each rate's `source` says which.
    """
    found = stored(folder, device)
    if found is not None:
        return found
    name = machine_name(device)
    guess = assumed(device.type, name, usable_cores())
    for entry in _load():
        facts = _parsed(entry)
        if facts is not None and (entry.get("machine"), entry.get("device")) == (name, str(device)):
            return replace(facts, disk=guess.disk, disk_cpu_seconds_per_byte=guess.disk_cpu_seconds_per_byte)
    return guess


def _key(folder: str | os.PathLike[str], device: torch.device) -> dict[str, str]:
    """What tells one entry from another. The weights decide which file system: the hub's are links to elsewhere."""
    path = Path(folder)
    path = min(path.glob("*.safetensors"), default=path)
    return {"machine": machine_name(device), "device": str(device), "file_system": f"{path.stat().st_dev:x}"}


def _key_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry.get(name) for name in KEY}


def _parsed(entry: Mapping[str, Any]) -> HardwareFacts | None:
    try:
        facts = HardwareFacts.from_dict(entry["facts"])
        return facts if entry["device"] == "cpu" or all(getattr(facts, link) for link in LINKS) else None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _load() -> list[dict[str, Any]]:
    """The entries of the file; none if there is no such file, or it is something else."""
    try:
        data = read_json(store_file(), MANIFEST)
    except CheckpointError:
        return []
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("machines"), list):
        return []
    return [entry for entry in data["machines"] if isinstance(entry, dict)]


def _replace(file: Path, text: str) -> None:
    """Put `text` into `file` as one step, on the disk when this returns. The lock is held."""
    file = Path(os.path.realpath(file))  # a link stays one
    if os.path.lexists(file) and not file.is_file():
        raise OSError(errno.EINVAL, f"it is {what_lies(file)}", str(file))
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
