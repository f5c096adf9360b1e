"""This says which files in a folder are those of a checkpoint's weights, and opens none but the index of its shards.

Importing it is cheap: what is not there can be told before torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from airstream.checkpoint.names import PICKLE_FILE, PICKLE_INDEX, SHARD_INDEX, SINGLE_FILE, file_name
from airstream.checkpoint.shard_index import read_weight_map
from airstream.errors import CheckpointNotFoundError

PICKLE_SUFFIXES = (".bin", ".pth")

NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model)")
"""What begins the names of pickles that trainers leave beside a checkpoint."""


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of the checkpoint in `folder`, by name: some of them may be missing."""
    _, files = pickle_files(folder, variant)
    if files:
        return files
    single, index = folder / file_name(SINGLE_FILE, variant), folder / file_name(SHARD_INDEX, variant)
    if single.is_file():
        return [single]
    expected = read_weight_map(index) if index.is_file() else {}
    named = [folder / shard for shard in sorted(set(expected.values()))]
    return named or sorted(folder.glob(file_name("*.safetensors", variant)))


def no_checkpoint(folder: Path, variant: str | None = None) -> CheckpointNotFoundError:
    """The error for a `folder` in which there is no file of weights."""
    what = "checkpoint" if variant is None else f"checkpoint of variant={variant!r}"
    names = [file_name(name, variant) for name in (SINGLE_FILE, SHARD_INDEX, PICKLE_FILE)]
    return CheckpointNotFoundError(f"{folder} has no {what}: expected {names[0]}, {names[1]} or {names[2]}")


def pickle_files(folder: Path, variant: str | None = None) -> tuple[Mapping[str, str] | None, list[Path]]:
    """The index of a pickled checkpoint, if it has one, and its files; no files if it is not pickled."""
    single, index = folder / file_name(PICKLE_FILE, variant), folder / file_name(PICKLE_INDEX, variant)
    if any((folder / file_name(name, variant)).is_file() for name in (SINGLE_FILE, SHARD_INDEX)):
        return None, []
    if single.is_file():
        return None, [single]
    if index.is_file():
        expected = read_weight_map(index)
        return expected, [folder / shard for shard in sorted(set(expected.values()))]
    if any(folder.glob(file_name("*.safetensors", variant))) or variant is not None:
        return None, []
    others = sorted(file for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES)
    return None, [file for file in others if not NOT_WEIGHTS.match(file.name)]
