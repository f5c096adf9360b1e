"""This tells the C library what to do with freed memory: keep it for the next time, or give it back.

glibc's malloc puts blocks on its heap that are smaller than the largest one freed so far (up to 32 MiB), and what is
freed there stays with the process: of the activations of a prompt, up to twice as much as is ever in use. Within
`giving_back`, large blocks are mapped one by one, and go when they are freed. Between tokens that would be waste: the
same sizes come back at once, and fresh memory has to be cleared. It knows nothing of models; elsewhere does nothing.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from airstream.reporting.units import MIB

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""malloc.h"""

LARGE_BYTES = MIB // 4
"""From this size on blocks are given back."""

KEPT_MMAP_BYTES, KEPT_TRIM_BYTES = 32 * MIB, 64 * MIB
"""What glibc comes to by itself in a process that has freed large blocks."""


@contextmanager
def giving_back(applies: bool) -> Iterator[None]:
    """Within, if it `applies`, what large tensors leave is given back at once. Of one thread at a time."""
    library = _glibc() if applies else None
    if library is None:
        yield
        return
    library.malloc_trim(0)  # what earlier computations left behind
    library.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    library.mallopt(M_TRIM_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_THRESHOLD, KEPT_MMAP_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_TRIM_BYTES)


@cache
def _glibc() -> Any:
    """The C library of this process if it is glibc; else None."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
