"""This calls products.c, where it was compiled when airstream was installed.

It knows what the kernels take, and keeps alive what they read. It believes the sizes that it is told.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from airstream.codecs.block_types import GRID_TYPES, BlockType
from airstream.codecs.library import library

_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_size_t

_PRODUCT = (_ADDRESS, _SIZE, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _ADDRESS)
_ROWS = (_ADDRESS, _SIZE, _SIZE, _ADDRESS, ctypes.c_int, _ADDRESS)

SCALE_BYTES = {torch.float32: 4, torch.bfloat16: 2}
"""Dtypes of scales that kernels read."""


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, _ADDRESS) for name in ("numbers", "scales", "decode", "table")),
        *((name, _SIZE) for name in ("columns", "row_bytes", "group", "slots", "scale_bytes")),
    )


class NativeRows:
    """A weight as kernels see it. It keeps the tensors that it is made of."""

    def __init__(
        self,
        kind: str,
        sizes: tuple[int, int, int, int],
        numbers: torch.Tensor,
        scales: torch.Tensor | None,
        table: torch.Tensor | None,
        block: BlockType | None,
    ) -> None:
        """`sizes` are the numbers of a row, its bytes, the numbers of a group, and the slots of a lossless block."""
        self.columns, row_bytes, group, slots = sizes
        self._kind, self._kept = kind, (numbers, scales, table)
        self._weight = _Weight(
            numbers.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if block is None else ctypes.cast(decoder_of(block), _ADDRESS),
            None if table is None else table.data_ptr(),
            self.columns,
            row_bytes,
            group,
            slots,
            4 if scales is None else SCALE_BYTES[scales.dtype],
        )

    def multiply(self, first: int, end: int, vectors: torch.Tensor, out: torch.Tensor) -> int:
        """Write the products of rows `first` to `end` with `vectors` (count, columns), float32, to `out` (count, rows).

        Returns:
            How many rows come before one that cannot be unpacked.
        """
        buffer = torch.empty(2 * self.columns, dtype=torch.float32, device="cpu")
        targets = (out.data_ptr(), out.shape[1], buffer.data_ptr())
        kernel = _kernel(f"product_{self._kind}", _PRODUCT)
        return kernel(ctypes.byref(self._weight), first, end, vectors.data_ptr(), len(vectors), *targets)

    def make_dense(self, first: int, end: int, out: torch.Tensor) -> int:
        """Write rows `first` to `end` to `out` (rows, columns), float32 or bfloat16. Returns as `multiply` does."""
        buffer = torch.empty(2 * self.columns, dtype=torch.float32, device="cpu")
        kernel = _kernel(f"rows_{self._kind}", _ROWS)
        narrow = out.dtype == torch.bfloat16
        return kernel(ctypes.byref(self._weight), first, end, out.data_ptr(), narrow, buffer.data_ptr())


def decoder_of(block: BlockType) -> Any:
    """The kernel that decodes `block`; None if there is none that needs nothing besides."""
    return None if block.name.startswith(GRID_TYPES) else getattr(library(), f"decode_{block.name.lower()}", None)


@functools.cache
def _kernel(name: str, types: tuple[Any, ...]) -> Callable[..., int]:
    kernel = getattr(library("products"), name)
    kernel.argtypes, kernel.restype = types, ctypes.c_size_t
    return kernel
