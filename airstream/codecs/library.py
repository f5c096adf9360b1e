"""This knows where the compiled kernels are, if they are anywhere. It refuses to know what is among them."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path


@functools.cache
def library(name: str = "blocks") -> ctypes.CDLL | None:
    """The library `name`, if it was compiled when airstream was installed, for this machine."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = folder / f"_{name}{suffix}"
        if file.is_file():
            try:
                return ctypes.CDLL(str(file))
            except OSError:  # of another machine, or another C library
                return None
    return None


def has_kernels() -> bool:
    """Whether those of products, which take all others, were compiled when this airstream was installed."""
    products = library("products")
    return products is not None and library() is not None and hasattr(products, "team_unpack")
