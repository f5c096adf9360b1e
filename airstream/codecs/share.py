"""This shares the rows of a weight among as many threads as torch computes with, the calling one among them.

The others wait in between, and end with the process; a fork of it starts its own. It refuses to know what is done with
a row.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

__all__ = ["share"]

MIN_SHARE = 1 << 19
"""Numbers that are worth a thread: less than it takes to wake one."""

RUNS_EACH = 4
"""Runs that there are for each thread: who is held up by other programs takes fewer of them."""

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
"""By the process and the number of threads."""


def share(work: Callable[[int, int], object], rows: int, columns: int) -> None:
    """Call `work(first, end)` for runs of rows that are all of them together, at once. It keeps no lock of Python's.

    What the calling thread's runs raise is raised, or else what the first of the others does. If the caller is
    interrupted meanwhile, the others end behind its back: `work` must keep alive what it reads and writes.
    """
    threads = torch.get_num_threads()
    count = max(1, min(threads * RUNS_EACH, rows, rows * columns // MIN_SHARE))
    runs = [(rows * part // count, rows * (part + 1) // count) for part in range(count)]
    numbers = itertools.count()  # `next` is one step of the interpreter: no two threads get the same

    def work_on_some() -> None:
        while (number := next(numbers)) < count:
            work(*runs[number])

    beside = min(threads, count) - 1
    others: list[Future[None]] = [_pool(threads - 1).submit(work_on_some) for _ in range(beside)] if beside else []
    work_on_some()
    for other in others:
        other.result()


def _pool(count: int) -> ThreadPoolExecutor:
    key = (os.getpid(), count)
    if key not in _pools:  # whoever comes at the same time makes a second one, which ends by itself
        _pools[key] = ThreadPoolExecutor(count, thread_name_prefix="airstream-products")
    return _pools[key]
