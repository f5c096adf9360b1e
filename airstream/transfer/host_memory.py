"""This maps host memory: page-aligned, no page more than asked, touched before the token loop needs it.

`torch.empty` and pinned allocators round sizes up (torch's pinned allocator to the next power of two, so 20 GB pins 32)
and leave the first touch, at about 1.5 GB/s, to the token loop. An anonymous mapping does neither.

It knows pages. It refuses to know what they hold, and how they are pinned.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading

import torch

from airstream.reporting.units import MIB, round_up
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.shortage import allocating

SLICE_BYTES = 32 * MIB
"""Touched at a time in the background; a smaller buffer is touched at once."""

HUGE_BYTES = 2 * MIB
"""Of a huge page. A disk fills one at once, and ordinary pages one by one: in a virtual machine at half the speed."""

_MADV_POPULATE_WRITE = 23  # Linux >= 5.14; not yet in Python's mmap module


class HostBuffer:
    """`nbytes` of page-aligned, zeroed host memory. It is given back with the last view of it.

    A large one is touched in the background, while the first reads into it are already under way: they find their pages
    or touch them themselves, and nobody waits. With `touch=False` that is left to the reads altogether.

    Attributes:
        tensor: the memory as a uint8 tensor of shape (nbytes,).
        view: the same memory as a writable memoryview.

    Raises:
        BudgetError: the system has not so much.
    """

    def __init__(self, nbytes: int, touch: bool = True) -> None:
        self.nbytes = nbytes
        mapped_bytes = max(round_up(nbytes, PAGE_BYTES), PAGE_BYTES)
        with allocating(mapped_bytes, is_on_host=True):
            mapping, start = _map(mapped_bytes)
        self.view = memoryview(mapping)[start : start + nbytes]
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)[start : start + nbytes]
        if not touch:
            return
        if nbytes <= SLICE_BYTES or sys.platform != "linux":
            _fault_in(mapping, start, mapped_bytes)
        else:
            arguments = mapping, start, mapped_bytes
            threading.Thread(target=_fault_in, args=arguments, name="airstream-first-touch", daemon=True).start()


def _map(nbytes: int) -> tuple[mmap.mmap, int]:
    """A mapping, and where in it `nbytes` begin: with a huge page, if they have room for one. The rest stays untouched.

    8 MiB from anywhere are three huge pages and 512 ordinary ones.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes), 0
    spare = HUGE_BYTES - PAGE_BYTES if sys.platform == "linux" and nbytes >= HUGE_BYTES else 0
    # Private: Python's default is shared memory, which huge pages and memory limits treat differently.
    mapping = mmap.mmap(-1, nbytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -_address(mapping) % HUGE_BYTES if spare else 0
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones do
            mapping.madvise(mmap.MADV_HUGEPAGE, start, nbytes)  # no more, or a last small page would be a huge one
    return mapping, start


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _fault_in(mapping: mmap.mmap, begin: int, nbytes: int) -> None:
    """Touch every page of `nbytes` from `begin` on, without changing what is in it."""
    if sys.platform != "linux":
        torch.frombuffer(mapping, dtype=torch.uint8).zero_()  # not yet in use: see HostBuffer
        return
    # Through ctypes, because the mmap module would hold the interpreter's lock for as long as it takes.
    libc = ctypes.CDLL(None, use_errno=True)
    start = _address(mapping) + begin
    for offset in range(0, nbytes, SLICE_BYTES):
        size = min(SLICE_BYTES, nbytes - offset)
        if libc.madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(size), _MADV_POPULATE_WRITE):
            return  # an older kernel: the first pass touches what it uses
