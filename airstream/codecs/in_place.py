"""This unpacks blocks, be it in the memory that their numbers are to fill, by all threads that torch computes with.

Packed bytes are fewer, and may lie at the end of that memory: numbers that are written from its start on never reach
what has not been read yet. It knows addresses and kernels. It refuses to know where blocks come from.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from airstream.codecs.block_types import GRID_TYPES, BlockType
from airstream.codecs.grids import grid_of
from airstream.codecs.library import has_kernels, library
from airstream.codecs.lossless_blocks import LOSSLESS, damage
from airstream.codecs.team import team_for
from airstream.errors import CheckpointError

__all__ = ["may_unpack", "unpack_in_place"]

WRITTEN = (torch.float32, torch.bfloat16)
"""What kernels write; of lossless blocks, the latter."""

ROOM = 4096
"""Numbers that a thread unpacks at a time, in its first cache, before they go to memory."""

_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_size_t

_TYPES = (_ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS)


class _Blocks(ctypes.Structure):
    """`Blocks` of team.c."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("decode", "grid")),
        *((name, _SIZE) for name in ("nbytes", "elements", "item_bytes", "slots", "is_lossless")),
    )


def may_unpack(block: BlockType, dtype: torch.dtype) -> bool:
    """Whether there is a kernel that makes numbers in `dtype` of `block`, and these take more bytes than it does."""
    if not has_kernels() or _kernel(block.name) is None or block.nbytes >= block.elements * dtype.itemsize:
        return False
    return dtype == torch.bfloat16 if block.name in LOSSLESS else dtype in WRITTEN


def unpack_in_place(numbers: torch.Tensor, packed: torch.Tensor, block: BlockType) -> None:
    """Write to `numbers`, flat, what the bytes of `packed`, uint8, are packed of: both of the host, contiguous.

    They may share memory, if `packed` ends where `numbers` does, or behind.

    Raises:
        CheckpointError: a lossless block is damaged; the message has its number, from 0.
        ValueError: they do not go together, or lie otherwise, which C would not notice.
    """
    count, dtype = packed.numel() // block.nbytes, numbers.dtype
    if packed.numel() != count * block.nbytes or numbers.numel() != count * block.elements:
        raise ValueError(f"{packed.numel()} B of {block.name} do not make {numbers.numel()} numbers")
    if not all(each.is_cpu and each.is_contiguous() for each in (numbers, packed)) or not may_unpack(block, dtype):
        raise ValueError(f"no kernel unpacks {block.name} on {packed.device} to {dtype} on {numbers.device}")
    start, end = numbers.data_ptr(), numbers.data_ptr() + numbers.nbytes
    first, last = packed.data_ptr(), packed.data_ptr() + packed.nbytes
    if first < end and last > start and last < end:
        raise ValueError(f"{packed.numel()} B of {block.name} end before their numbers, in whose place they are")
    team, how = team_for(count, block.elements, ROOM), _blocks(block, dtype)
    done = _unpack()(ctypes.byref(team), ctypes.byref(how), first, count, start)
    if done < count:
        raise CheckpointError(damage(block, done))


def _blocks(block: BlockType, dtype: torch.dtype) -> _Blocks:
    kernel, lossless = _kernel(block.name), LOSSLESS.get(block.name)
    assert kernel is not None
    decode, grid = kernel
    slots = lossless.slots(block) if lossless is not None else 0
    address = None if grid is None else grid.ctypes.data
    return _Blocks(decode, address, block.nbytes, block.elements, dtype.itemsize, slots, lossless is not None)


@functools.cache
def _unpack() -> Callable[..., int]:
    function = library("products").team_unpack  # type: ignore[union-attr]  # whoever asks has looked
    function.argtypes, function.restype = _TYPES, _SIZE
    return function


@functools.cache
def _kernel(name: str) -> tuple[Any, np.ndarray | None] | None:
    """The kernel for blocks of type `name`, if there is one, and the grid that it takes, if any."""
    function, grid = getattr(library(), f"decode_{name.lower()}", None), grid_of(name)
    if function is None or (name.startswith(GRID_TYPES) and grid is None):
        return None
    return ctypes.cast(function, _ADDRESS), grid
