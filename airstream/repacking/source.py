"""This says what a checkpoint was when it began to be written anew, and refuses one that has been changed since.

Half of one checkpoint and half of another are taken for neither. It knows files. It refuses to know where they go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airstream.checkpoint.names import MANIFEST
from airstream.errors import CheckpointError
from airstream.repacking.manifest import fingerprint
from airstream.repacking.write import sha256_of
from airstream.transfer.files import failure_of

__all__ = ["Source", "copied_files", "state_of"]

NOT_COPIED = re.compile(
    r"\..*|.*\.(safetensors|bin|pth|pt|gguf|h5|msgpack|onnx|ot|tflite|index\.json)|" + re.escape(MANIFEST)
)
"""Files of weights, which are rewritten, and copies of them in other formats; hidden files."""


@dataclass(frozen=True, slots=True)
class Source:
    """What tells a checkpoint from others.

    Attributes:
        folder: where it lies.
        weights: fingerprints of its files of weights.
        small: checksums of all files that are copied, by name.
    """

    folder: Path
    weights: Sequence[Mapping[str, Any]]
    small: Mapping[str, str]

    def check_weights(self, files: Iterable[Path]) -> None:
        """Refuse to go on if some of its `files` of weights are others now.

        Raises:
            CheckpointError: they are, or are gone.
        """
        self._refuse(each["name"] for each in fingerprint(files) if each not in self.weights)

    def check_small(self) -> None:
        """As `check_weights`, of the files that are copied."""
        now = _small(self.folder)
        self._refuse(name for name in sorted({*now, *self.small}) if now.get(name) != self.small.get(name))

    def _refuse(self, changed: Iterable[str]) -> None:
        if names := ", ".join(changed):
            raise CheckpointError(
                f"{self.folder} was changed while it was written anew ({names}): do so again when nobody writes to it"
            )


def state_of(folder: Path, files: Iterable[Path]) -> Source:
    """What the checkpoint in `folder`, with its weights in `files`, is now.

    Raises:
        CheckpointNotFoundError, ReadError: a file is gone, or cannot be read.
    """
    return Source(folder, fingerprint(files), _small(folder))


def copied_files(folder: Path) -> list[Path]:
    """The small files of a checkpoint, which belong to any copy of it: config, tokenizer, code."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not NOT_COPIED.fullmatch(file.name)]


def _small(folder: Path) -> dict[str, str]:
    try:
        return {file.name: sha256_of(file) for file in copied_files(folder)}
    except OSError as error:
        raise failure_of(f"reading {error.filename or folder}", error) from error
