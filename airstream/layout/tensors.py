"""A `TensorSpec` is all that is known of one tensor of a model before it is read: name, type, shape, and its bytes.

It knows nothing of how that was found out, of devices, or of where in memory the tensor is going to lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from airstream.transfer.piece import Piece

CACHE_LINE_BYTES = 64
"""What torch aligns its own host allocations to."""

RAW_PREFIX = "raw:"
"""Before the names of raw tensors: a converted tensor may be called like the one it is made of."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter or buffer of the model, and the pieces of the checkpoint it is made of.

    Attributes:
        pieces: what is read; `target` counts from the first byte of this tensor. Empty if `made_by` makes it.
        line_offset: where within a cache line a resident model has it, which decides the order in which CPU kernels add
            up, and so the last bit. None if that is where it lies in the file, because the model maps it.
        transposed: it lies in memory with rows and columns exchanged, as the resident one, of shape (columns, rows).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    made_by: Conversion | None = None
    line_offset: int | None = None
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes that the tensor takes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def identity(self) -> object:
        """Equal for tensors that are made of the same bytes."""
        return self.pieces or self.name

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The tensors that are read for it: itself, or what it is made of."""
        return self.made_by.sources if self.made_by is not None else (self,)


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converter of transformers that has to see values, to be run on raw tensors after they have been read.

    Attributes:
        name: the name it is looked up by.
        patterns: for each source, the pattern by which transformers knows it.
        sources: the raw tensors, named by their checkpoint keys behind `RAW_PREFIX`.
        scratch_bytes: the bytes that it, or computing with what it makes, takes besides for a moment.
        growth_bytes: the bytes that computing with it adds for as long as it is in its module.
        is_object: it makes an object of views of its sources, which takes their place: nothing is copied, and the
            object lasts as long as its sources lie in the same place.
    """

    name: str
    patterns: tuple[str, ...]
    sources: tuple[TensorSpec, ...]
    scratch_bytes: int = 0
    growth_bytes: int = 0
    is_object: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of all sources."""
        return sum(source.nbytes for source in self.sources)


def view_of(memory: torch.Tensor, offset: int, spec: TensorSpec) -> torch.Tensor:
    """The tensor `spec` that starts at byte `offset` of `memory`."""
    numbers = memory[offset : offset + spec.nbytes].view(spec.dtype)
    return numbers.view(spec.shape[::-1]).t() if spec.transposed else numbers.view(spec.shape)
