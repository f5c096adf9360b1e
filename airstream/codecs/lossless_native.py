"""This decodes, makes, counts and proves lossless blocks by kernels, where those were compiled with airstream.

Without them torch, numpy and zlib do the same, to the same bits. It believes the sizes that it is told. It refuses to
know why they are right.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from airstream.codecs.library import library

Kernel = Callable[[torch.Tensor, torch.Tensor], int]
"""Takes what is written and what is read, rows of bits of bfloat16 and blocks, or the other way; returns how many come
before the first that cannot be."""

TYPES = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)


def decoder(name: str, elements: int, slots: int) -> Kernel | None:
    """What decodes blocks of codec `name` to bits of bfloat16, if there is a kernel."""
    return _between(f"decode_{name}", elements, slots)


def encoder(name: str, elements: int, slots: int, bases: torch.Tensor | None = None) -> Kernel | None:
    """What makes blocks of codec `name`, but for their checksums, of bits of bfloat16, if there is a kernel.

    Where each window begins, as `count_outside` found out, is counted anew without `bases`.
    """
    function = _function(f"encode_{name}", (*TYPES, ctypes.c_void_p))
    if function is None:
        return None
    known = None if bases is None else bases.data_ptr()
    return lambda to, source: function(source.data_ptr(), to.data_ptr(), len(source), elements, slots, known)


Counted = tuple[list[int], torch.Tensor]


def count_outside() -> Callable[[torch.Tensor, Sequence[int]], Counted] | None:
    """What counts numbers outside of the best window, of each width, in the worst of some rows, if there is a kernel.

    It gives where the windows begin, too, as uint8 of shape (widths, rows).
    """
    types = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, *[ctypes.c_void_p] * 3)
    function = _function("count_outside", types)
    if function is None:
        return None

    def count(rows: torch.Tensor, widths: Sequence[int]) -> Counted:
        wanted, most = (ctypes.c_int32 * len(widths))(*widths), (ctypes.c_size_t * len(widths))()
        bases = torch.empty((len(widths), len(rows)), dtype=torch.uint8, device="cpu")
        function(rows.data_ptr(), *rows.shape, len(widths), wanted, most, bases.data_ptr())
        return list(most), bases

    return count


def checksums(rows: torch.Tensor) -> torch.Tensor:
    """CRC-32 of the bytes of each of `rows`, contiguous, as int32."""
    size = rows.shape[1] * rows.element_size()
    sums = torch.empty(len(rows), dtype=torch.int32, device="cpu")
    function = _function("crc32_of_rows", TYPES[:4])
    if function is not None and function(rows.data_ptr(), sums.data_ptr(), len(rows), size):
        return sums
    plain = rows.view(torch.uint8).numpy().reshape(-1).data
    by_zlib = (zlib.crc32(plain[at : at + size]) for at in range(0, len(plain), size))
    return torch.from_numpy(np.fromiter(by_zlib, dtype="<u4", count=len(rows)).view("<i4"))


def _between(name: str, elements: int, slots: int) -> Kernel | None:
    function = _function(name, TYPES)
    if function is None:
        return None
    return lambda to, source: function(source.data_ptr(), to.data_ptr(), len(source), elements, slots)


def _function(name: str, types: tuple[Any, ...]) -> Callable[..., int] | None:
    function = getattr(library(), name, None)
    if function is not None:
        function.argtypes, function.restype = types, ctypes.c_size_t
    return function
