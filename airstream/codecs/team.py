"""This says who computes the rows of a weight: the threads that torch computes with, where they can be had.

OpenMP keeps them awake for a while after a piece of work, so that others would wait for the processors that they hold.
Where there is no OpenMP, a product starts threads of its own. It refuses to know what is done with a row.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

__all__ = ["Team", "team_for"]

MIN_SHARE = 1 << 18
"""Numbers that are worth a thread: less than it takes to wake one."""

RUNS_EACH = 8
"""Runs that there are for each thread: who is held up by other programs takes fewer of them."""

MAX_THREADS = 1024
"""As team.c has it."""

_PROCESS = os.getpid()
"""A fork of it has none of torch's threads, and OpenMP would wait for them."""


class Team(ctypes.Structure):
    """`Team` of team.c, which it describes, and the memory that its threads work in."""

    _fields_ = (
        ("parallel", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("threads", "run", "room")),
        ("buffers", ctypes.c_void_p),
    )

    def __init__(self, threads: int, run: int, room: int) -> None:
        self._memory = torch.empty(threads * room, dtype=torch.float32, device="cpu")
        waiting = torch_threads() if os.getpid() == _PROCESS else None
        super().__init__(waiting, threads, run, room, self._memory.data_ptr())


def team_for(rows: int, columns: int, room: int = 0) -> Team:
    """Who computes so many rows; everyone has room for two in float32, and for `room` such numbers."""
    is_worth_it = rows * columns >= 2 * MIN_SHARE
    # all of them or none: GNU's OpenMP ends those that a piece of work has no use for, and starts others for the next
    threads = min(torch.get_num_threads(), MAX_THREADS) if is_worth_it else 1
    return Team(threads, max(1, rows // (threads * RUNS_EACH)), max(room, 2 * columns))


@functools.cache
def torch_threads() -> int | None:
    """Where OpenMP's function is that has torch's threads do something; None without GNU's, or one that can be called
    like it.
    """
    file = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # whose own libraries are searched, too
    try:
        return ctypes.cast(ctypes.CDLL(str(file)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
