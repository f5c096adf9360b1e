"""This shares the rows of a weight among as many threads as torch computes with, the calling one among them.

The others wait in between, and end with the process; a fork of it starts its own. It refuses to know what is done with
a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import torch

__all__ = ["share"]

MIN_SHARE = 1 << 19
"""Numbers that are worth a thread: less than it takes to wake one."""

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
"""By the process and the number of threads."""


def share(work: Callable[[int, int], object], rows: int, columns: int) -> None:
    """Call `work(first, end)` for runs of rows that are all of them together, at once. It keeps no lock of Python's.

    What the calling thread's share raises is raised, or else what the first of the others does. If the caller is
    interrupted meanwhile, the others end behind its back: `work` must keep alive what it reads and writes.
    """
    count = max(1, min(torch.get_num_threads(), rows, rows * columns // MIN_SHARE))
    cuts = [rows * part // count for part in range(count + 1)]
    others: list[Future[object]] = []
    if count > 1:
        pool = _pool(torch.get_num_threads() - 1)
        others = [pool.submit(work, first, end) for first, end in pairwise(cuts[1:])]
    work(cuts[0], cuts[1])
    for other in others:
        other.result()


def _pool(count: int) -> ThreadPoolExecutor:
    key = (os.getpid(), count)
    if key not in _pools:  # whoever comes at the same time makes a second one, which ends by itself
        _pools[key] = ThreadPoolExecutor(count, thread_name_prefix="airstream-products")
    return _pools[key]
