"""This decodes by blocks.c, where it was compiled when airstream was installed: some times faster than torch, on a CPU.

It is optional: without a C compiler, and for what it has no kernel, torch decodes, to the same bits. A kernel holds no
lock of the interpreter, so that several threads decode at once. It knows what kernels take. It refuses to know when
they are used.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from airstream.codecs.block_types import GRID_TYPES
from airstream.codecs.grids import grid_of
from airstream.codecs.library import library

__all__ = ["kernel"]

Kernel = Callable[[int, int, int, bool], None]
"""Takes the address of blocks, that of the numbers, how many blocks, and whether numbers are bfloat16, not float32."""

DTYPES = (torch.float32, torch.bfloat16)
"""What kernels write."""

TYPES = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


@functools.cache
def kernel(name: str) -> Kernel | None:
    """The kernel for blocks of type `name`, if there is one, and the table that it takes, if any."""
    function = getattr(library(), f"decode_{name.lower()}", None)
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
