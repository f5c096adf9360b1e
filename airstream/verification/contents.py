"""This says all that is wrong with the headers of a checkpoint, as far as they can be read, not the first of it.

It knows formats of checkpoints, and reads no weight. It refuses to know what the model would need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.names import PICKLE_FILE, PICKLE_INDEX, SHARD_INDEX, SINGLE_FILE, file_name
from airstream.checkpoint.pickles.tensors import read_pickle
from airstream.checkpoint.safetensors import read_header
from airstream.checkpoint.shard_index import read_weight_map
from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.checkpoint.weight_files import weight_files
from airstream.errors import CheckpointError


@dataclass
class Contents:
    """The files of a checkpoint and the tensors in them.

    Attributes:
        tensors: by name; of tensors that are not contiguous, the range of bytes that they lie in.
        files: whose headers are right.
        is_whole: every file could be read, so that a tensor that is not here is nowhere.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    is_whole: bool = True


def read_contents(folder: Path, variant: str | None = None) -> Contents:
    """The headers of everything in `folder`. Reads no weights."""
    contents = Contents()
    try:
        expected, files = _expected(folder, variant), weight_files(folder, variant)
    except CheckpointError as error:
        return Contents(faults=[str(error)], is_whole=False)
    if not files:
        of_variant = f" of variant={variant!r}" if variant else ""
        fault = f"{folder} has no checkpoint{of_variant}: neither safetensors nor pickles"
        return Contents(faults=[fault], is_whole=False)
    for file in files:
        read = read_header if file.suffix == ".safetensors" else _read_pickle
        _add(contents, file, read, expected)
    unread = {file.name for file in files} - {file.name for file in contents.files}
    for name, shard in (expected or {}).items():
        if name not in contents.tensors and shard not in unread:
            contents.faults.append(f"{folder / shard}: tensor {name!r} is missing, though the index places it there")
    return contents


def read_gguf_contents(file: Path) -> tuple[CheckpointIndex | None, Contents]:
    """The headers of a GGUF `file`, or of all that it is split in; what says of itself what model it holds."""
    try:
        index = GgufIndex.open(file)
    except CheckpointError as error:
        return None, Contents(faults=[str(error)], is_whole=False)
    return index, Contents(dict(index.items()), list(index.files))


def _add(
    contents: Contents,
    file: Path,
    read: Callable[[Path], Sequence[StoredTensor]],
    expected: Mapping[str, str] | None,
) -> None:
    try:
        tensors = read(file)
    except CheckpointError as error:
        contents.faults.append(str(error))
        contents.is_whole = False
        return
    contents.files.append(file)
    for tensor in tensors:
        if expected is not None and expected.get(tensor.name, file.name) != file.name:
            continue  # the index places it in another file
        if tensor.name in contents.tensors:
            other = contents.tensors[tensor.name].file.name
            contents.faults.append(f"tensor {tensor.name!r} is in two files, {other} and {file.name}")
        contents.tensors[tensor.name] = tensor


def _expected(folder: Path, variant: str | None) -> dict[str, str] | None:
    for names in ((SHARD_INDEX, SINGLE_FILE), (PICKLE_INDEX, PICKLE_FILE)):
        index, single = (file_name(name, variant) for name in names)
        if (folder / single).is_file():
            return None
        if (folder / index).is_file():
            return read_weight_map(folder / index)
    return None


def _read_pickle(file: Path) -> list[StoredTensor]:
    stored, scattered = read_pickle(file)
    return stored + [StoredTensor(t.name, t.file, t.offset, t.nbytes, t.dtype, t.shape) for t in scattered]
