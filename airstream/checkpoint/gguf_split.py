"""This knows the names of the files that a GGUF checkpoint is split in: each says which of how many it is."""

from __future__ import annotations

import re
from pathlib import Path

from airstream.errors import CheckpointError, CheckpointNotFoundError
from airstream.reporting.units import counted

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def split_files(file: Path) -> list[Path]:
    """All files of the checkpoint that `file` belongs to, the first one first; `file` alone if it is not split.

    Raises:
        CheckpointNotFoundError: one of them is missing.
        CheckpointError: the numbers in the name make no sense.
    """
    files = [file.with_name(name) for name in split_names(file.name)]
    if missing := [part.name for part in files if not part.is_file()]:
        raise CheckpointNotFoundError(
            f"{file.parent} lacks {len(missing)} of the {counted(len(files), 'file')} of this GGUF checkpoint: "
            f"{', '.join(missing[:3])}. Download it again"
        )
    return files


def split_names(name: str) -> list[str]:
    """The names of all files of the checkpoint whose file `name` is one of."""
    match = SPLIT_NAME.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise CheckpointError(
            f"{name!r} is not one of {counted(count, 'file')}: the name of a GGUF file says which of how many"
        )
    return [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
