"""These types have numbers that are looked up in large tables (IQ1, IQ2, IQ3), or ternary ones. Package gguf has both.

Its tables are used by the compiled kernels, too; its arithmetic, in numpy, is the reference, and slow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch

from airstream.codecs.block_types import GRID_TYPES
from airstream.codecs.words import Unpacked
from airstream.errors import UnsupportedError
from airstream.reporting.extras import install


def grid_of(name: str) -> np.ndarray | None:
    """The table of type `name` as bytes, row by row; None if it has none, or the package gguf is not there."""
    if not name.startswith(GRID_TYPES) or importlib.util.find_spec("gguf") is None:
        return None
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    return np.ascontiguousarray(kind.grid.reshape(-1).astype(np.int8))


def by_gguf(name: str) -> Callable[[torch.Tensor], Unpacked]:
    """A function that takes blocks (n, bytes) of type `name` apart, one group each, computed already."""

    def unpack(blocks: torch.Tensor) -> Unpacked:
        if importlib.util.find_spec("gguf") is None:
            raise UnsupportedError(f"weights of type {name} need the package gguf: {install('gguf', 'gguf')}")
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[name]
        with np.errstate(all="ignore"):  # scales that are no numbers are the file's affair
            numbers = dequantize(blocks.cpu().contiguous().numpy(), kind)
        return Unpacked(torch.from_numpy(numbers).to(blocks.device).unsqueeze(1))

    return unpack
