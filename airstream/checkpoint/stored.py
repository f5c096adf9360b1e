"""A stored tensor is one as it lies in a file, whichever format the file has; an index has all those of a checkpoint.

It knows places and types. It refuses to know how they were found out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from airstream.codecs.block_types import BlockType

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors' names of the types."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: `nbytes` bytes at `offset` of `file`, row-major, little-endian.

    Attributes:
        dtype: safetensors' name of what its numbers are, or that of the blocks that GGUF packs them in.
        resident_offset: where in memory of its own a resident model has it, in bytes. None if it maps the file.
        block: the blocks that its numbers are packed in, if they are.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    resident_offset: int | None = None
    block: BlockType | None = None

    @property
    def end(self) -> int:
        """The first byte of the file behind the tensor."""
        return self.offset + self.nbytes


class CheckpointIndex(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint by name, and the files they lie in."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = dict(tensors)
        self.files: tuple[Path, ...] = tuple(sorted({tensor.file for tensor in tensors.values()}))
        self.nbytes: int = sum(tensor.nbytes for tensor in tensors.values())

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
