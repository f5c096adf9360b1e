"""This says which format of checkpoint a folder holds: safetensors, or what `torch.save` pickles, as transformers does.

Which files are a checkpoint's, `weight_files` knows; what is in them is for the module of each format.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from airstream.checkpoint.names import PICKLE_INDEX
from airstream.checkpoint.pickles.gather import gather
from airstream.checkpoint.pickles.tensors import ScatteredTensor, read_pickle
from airstream.checkpoint.safetensors import has_weights as has_safetensors
from airstream.checkpoint.safetensors import open_safetensors
from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.checkpoint.weight_files import pickle_files
from airstream.errors import CheckpointError


def open_checkpoint(folder: Path, progress: bool = True, variant: str | None = None) -> CheckpointIndex:
    """The index of the checkpoint in `folder`, safetensors before pickles.

    Args:
        progress: show a bar if tensors have to be rearranged in the cache folder first.
        variant: what stands before the ending of its files' names, such as "fp16"; nothing if None.

    Raises:
        CheckpointNotFoundError: no checkpoint, or a shard that the index names is missing.
        CheckpointError: a file is truncated or corrupt, or refers to code; nothing was loaded or executed.
    """
    expected, files = pickle_files(folder, variant)
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
    _, files = pickle_files(folder, variant)
    return all(file.is_file() for file in files) if files else has_safetensors(folder, variant)


def _tensors(files: list[Path]) -> Iterator[StoredTensor | ScatteredTensor]:
    for file in files:
        for tensors in read_pickle(file):
            yield from tensors
