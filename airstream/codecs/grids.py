"""Types whose numbers are looked up in large tables (IQ1, IQ2, IQ3), and the ternary ones, by way of the package gguf.

Its tables and its arithmetic, in numpy, are the reference; they are slow, and such files are rare enough for that.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch

from airstream.codecs.words import Unpacked
from airstream.errors import UnsupportedError


def by_gguf(name: str) -> Callable[[torch.Tensor], Unpacked]:
    """A function that takes blocks (n, bytes) of type `name` apart, one group each, computed already."""

    def unpack(blocks: torch.Tensor) -> Unpacked:
        if importlib.util.find_spec("gguf") is None:
            raise UnsupportedError(f'weights of type {name} need the package gguf: pip install "airstream[gguf]"')
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[name]
        with np.errstate(all="ignore"):  # scales that are no numbers are the file's affair
            numbers = dequantize(blocks.cpu().contiguous().numpy(), kind)
        return Unpacked(torch.from_numpy(numbers).to(blocks.device).unsqueeze(1))

    return unpack
