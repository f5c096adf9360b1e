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
from airstream.codecs.team import team_for

_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_size_t

_PRODUCT = (_ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _SIZE)
_ROWS = (_ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _SIZE, _ADDRESS, ctypes.c_int, _SIZE, _ADDRESS, _SIZE)

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

    def multiply(self, rows: int, vectors: torch.Tensor, out: torch.Tensor) -> int:
        """Write the products of `rows` rows, all, with `vectors` (count, columns), float32, to `out` (count, rows).

        Returns:
            How many rows come before one that cannot be unpacked.
        """
        team, share = team_for(rows, self.columns), _function("team_product", _PRODUCT)
        given = (vectors.data_ptr(), len(vectors), out.data_ptr(), out.shape[1])
        return share(ctypes.byref(team), self._kernel("product"), ctypes.byref(self._weight), rows, *given)

    def make_dense(self, first: int, out: torch.Tensor) -> int:
        """Write the rows from `first` on to `out` (rows, columns), float32 or bfloat16. Returns as `multiply` does.

        They may lie in the memory of `out`, if they end where it does, or behind.

        Raises:
            ValueError: they end before.
        """
        numbers, start = self._kept[0], out.data_ptr()
        last = numbers.data_ptr() + numbers.nbytes
        if numbers.data_ptr() < start + out.nbytes and start < last < start + out.nbytes:
            raise ValueError(f"rows end {start + out.nbytes - last} B before the numbers in whose place they are")
        team, share = team_for(len(out), self.columns), _function("team_rows", _ROWS)
        given = (first, len(out), start, out.dtype == torch.bfloat16, self.columns * out.itemsize)
        stored = (numbers.data_ptr(), self._weight.row_bytes)
        return share(ctypes.byref(team), self._kernel("rows"), ctypes.byref(self._weight), *given, *stored)

    def _kernel(self, what: str) -> Any:
        return _address(f"{what}_{self._kind}")


def decoder_of(block: BlockType) -> Any:
    """The kernel that decodes `block`; None if there is none that needs nothing besides."""
    return None if block.name.startswith(GRID_TYPES) else getattr(library(), f"decode_{block.name.lower()}", None)


@functools.cache
def _function(name: str, types: tuple[Any, ...]) -> Callable[..., int]:
    function = getattr(library("products"), name)
    function.argtypes, function.restype = types, ctypes.c_size_t
    return function


@functools.cache
def _address(name: str) -> Any:
    return ctypes.cast(getattr(library("products"), name), _ADDRESS)
