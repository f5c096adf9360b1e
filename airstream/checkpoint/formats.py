"""This says which format of checkpoint a folder holds: safetensors, or what `torch.save` pickles, as transformers does.

It knows names of files; what is in them is for the module of each format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from airstream.checkpoint.names import PICKLE_FILE, PICKLE_INDEX, SHARD_INDEX, SINGLE_FILE, file_name
from airstream.checkpoint.pickles.gather import gather
from airstream.checkpoint.pickles.tensors import ScatteredTensor, read_pickle
from airstream.checkpoint.safetensors import has_weights as has_safetensors
from airstream.checkpoint.safetensors import open_safetensors
from airstream.checkpoint.shard_index import read_weight_map
from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pth")

NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model)")
"""What begins the names of pickles that trainers leave beside a checkpoint."""


def open_checkpoint(folder: Path, progress: bool = True, variant: str | None = None) -> CheckpointIndex:
    """The index of the checkpoint in `folder`, safetensors before pickles.

    Args:
        progress: show a bar if tensors have to be rearranged in the cache folder first.
        variant: what stands before the ending of its files' names, such as "fp16"; nothing if None.

    Raises:
        CheckpointNotFoundError: no checkpoint, or a shard that the index names is missing.
        CheckpointError: a file is truncated or corrupt, or refers to code; nothing was loaded or executed.
    """
    expected, files = _pickles(folder, variant)
    if not files:
        return open_safetensors(folder, variant)
    stored: dict[str, StoredTensor] = {}
    scattered: dict[str, ScatteredTensor] = {}
    for tensor in _tensors(files):
        if expected is not None and expected.get(tensor.name, tensor.file.name) != tensor.file.name:
            continue  # the index places it in another file
        other = stored.get(tensor.name) or scattered.get(tensor.name)
        if other is not None:
            raise CheckpointError(
                f"tensor {tensor.name!r} is in two files, {other.file.name} and {tensor.file.name}: remove one. If "
                "each has the part of one GPU of several, convert them with the script of transformers for the model"
            )
        if isinstance(tensor, StoredTensor):
            stored[tensor.name] = tensor
        else:
            scattered[tensor.name] = tensor
    for name, shard in (expected or {}).items():
        if name not in stored and name not in scattered:
            raise CheckpointError(
                f"{folder / shard}: tensor {name!r} is missing, though {PICKLE_INDEX} places it there"
            )
    if scattered:
        stored |= {tensor.name: tensor for tensor in gather(list(scattered.values()), progress)}
    return CheckpointIndex(stored)


def has_weights(folder: Path, variant: str | None = None) -> bool:
    """Whether `folder` has the files of a checkpoint, complete by name. Opens no file of weights.

    Raises:
        CheckpointError: the shard index is not one.
    """
    _, files = _pickles(folder, variant)
    return all(file.is_file() for file in files) if files else has_safetensors(folder, variant)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of the checkpoint in `folder`, by name: some of them may be missing."""
    _, files = _pickles(folder, variant)
    if files:
        return files
    single, index = folder / file_name(SINGLE_FILE, variant), folder / file_name(SHARD_INDEX, variant)
    if single.is_file():
        return [single]
    expected = read_weight_map(index) if index.is_file() else {}
    named = [folder / shard for shard in sorted(set(expected.values()))]
    return named or sorted(folder.glob(file_name("*.safetensors", variant)))


def _tensors(files: list[Path]) -> Iterator[StoredTensor | ScatteredTensor]:
    for file in files:
        for tensors in read_pickle(file):
            yield from tensors


def _pickles(folder: Path, variant: str | None = None) -> tuple[Mapping[str, str] | None, list[Path]]:
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
