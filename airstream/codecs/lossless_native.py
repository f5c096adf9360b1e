"""This decodes, makes and counts lossless blocks by lossless.c, where it was compiled when airstream was installed.

Without it torch and numpy do the same, to the same bits. It believes the sizes that it is told. It refuses to know why
they are right.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from airstream.codecs.library import library

Kernel = Callable[[torch.Tensor, torch.Tensor], int]
"""Takes what is written and what is read, rows of bits of bfloat16 and blocks, or the other way; returns how many come
before the first that cannot be."""

TYPES = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)


def decoder(name: str, elements: int, slots: int) -> Kernel | None:
    """What decodes blocks of codec `name` to bits of bfloat16, if there is a kernel."""
    return _between(f"decode_{name}", elements, slots)


def encoder(name: str, elements: int, slots: int) -> Kernel | None:
    """What makes blocks of codec `name`, but for their checksums, of bits of bfloat16, if there is a kernel."""
    return _between(f"encode_{name}", elements, slots)


def most_outside() -> Callable[[torch.Tensor, int], int] | None:
    """What counts numbers outside of the best window of so many exponents, in the worst row, if there is a kernel."""
    function = _function("most_outside", (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int))
    if function is None:
        return None
    return lambda rows, window: function(rows.data_ptr(), *rows.shape, window)


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
