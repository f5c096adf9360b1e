"""This decodes and packs by blocks.c and lossless.c, where they were compiled when airstream was installed.

On a CPU they are some times faster than torch. They are optional: without a C compiler, and for what has no kernel,
torch decodes, to the same bits. A kernel holds no lock of the interpreter, so that several threads decode at once. This
module knows where the library is. It refuses to know when it is used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from airstream.codecs.block_types import LOSSLESS, BlockType
from airstream.codecs.grids import GRID_TYPES, grid_of

__all__ = ["kernel", "lossless_decoder", "lossless_encoder", "most_outside"]

Kernel = Callable[[int, int, int, bool], None]
"""Takes the address of blocks, that of the numbers, how many blocks, and whether numbers are bfloat16, not float32."""

LosslessKernel = Callable[[torch.Tensor, torch.Tensor, BlockType], int]
"""Takes what is written, what is read, and the type of the blocks among them; returns how many blocks come before the
first that cannot be."""

DTYPES = (torch.float32, torch.bfloat16)
"""What kernels write."""

TYPES = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
LOSSLESS_TYPES = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)


@functools.cache
def kernel(name: str) -> Kernel | None:
    """The kernel for blocks of type `name`, if there is one, and the table that it takes, if any."""
    library = _library()
    function = getattr(library, f"decode_{name.lower()}", None) if library is not None else None
    if function is None:
        return None
    function.argtypes, function.restype = TYPES, None
    grid = grid_of(name)
    if grid is None and name.startswith(GRID_TYPES):
        return None

    address = None if grid is None else grid.ctypes.data_as(ctypes.c_void_p)  # which keeps the grid

    def decode(blocks: int, numbers: int, count: int, to_bfloat16: bool) -> None:
        function(blocks, numbers, count, to_bfloat16, address)

    return decode


@functools.cache
def lossless_decoder(name: str) -> LosslessKernel | None:
    """What decodes lossless blocks of type `name` to bits of bfloat16, if there is a kernel."""
    function = _function(f"decode_{name}", LOSSLESS_TYPES)
    if function is None:
        return None

    def decode(numbers: torch.Tensor, blocks: torch.Tensor, block: BlockType) -> int:
        slots = LOSSLESS[name].slots(block)
        return function(blocks.data_ptr(), numbers.data_ptr(), len(blocks), block.elements, slots)

    return decode


@functools.cache
def lossless_encoder(name: str) -> LosslessKernel | None:
    """What encodes bits of bfloat16 to lossless blocks of type `name`, but for checksums, if there is a kernel."""
    function = _function(f"encode_{name}", LOSSLESS_TYPES)
    if function is None:
        return None

    def encode(blocks: torch.Tensor, numbers: torch.Tensor, block: BlockType) -> int:
        slots = LOSSLESS[name].slots(block)
        return function(numbers.data_ptr(), blocks.data_ptr(), len(blocks), block.elements, slots)

    return encode


@functools.cache
def most_outside() -> Callable[[torch.Tensor, int], int] | None:
    """What counts the numbers outside of the best window of so many exponents, in the worst row."""
    function = _function("most_outside", (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int))
    if function is None:
        return None
    return lambda rows, window: function(rows.data_ptr(), *rows.shape, window)


def _function(name: str, types: tuple[Any, ...]) -> Callable[..., int] | None:
    function = getattr(_library(), name, None)
    if function is not None:
        function.argtypes, function.restype = types, ctypes.c_size_t
    return function


@functools.cache
def _library() -> ctypes.CDLL | None:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = folder / f"_blocks{suffix}"
        if file.is_file():
            try:
                return ctypes.CDLL(str(file))
            except OSError:  # of another machine, or another C library
                return None
    return None
