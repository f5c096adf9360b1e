"""This shares the rows of a weight among as many threads as torch computes with, the calling one among them.

The others wait for the next weight, and end when there is none for a while or a model is closed. A fork of the process
starts its own. Nothing here holds a lock in Python code, where an interrupt would leave it held. It refuses to know
what is done with a row.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

import torch

__all__ = ["dismiss", "share"]

MIN_SHARE = 1 << 19
"""Numbers that are worth a thread: less than it takes to wake one."""

RUNS_EACH = 4
"""Runs that there are for each thread: who is held up by other programs takes fewer of them."""

IDLE_SECONDS = 1.0
"""For which a thread waits for work: longer than anything in a pass, but for a slow disk."""

POLL_SECONDS = 1e-4
"""Between two looks at whether the others have ended, after an interrupt: a run takes about as long."""

Work = Callable[[int, int], object]


class _Task:
    """Runs of rows, each of which is for whoever comes first."""

    def __init__(self, work: Work, runs: list[tuple[int, int]]) -> None:
        self.work: Work | None = work
        self._runs = runs
        self._numbers = itertools.count()  # `next` is one step of the interpreter: no two threads get the same
        self._outcomes: SimpleQueue[BaseException | None] = SimpleQueue()
        self._helping: list[None] = []  # to which Python adds, and from which it takes, in one step

    def help(self) -> None:
        """`do_some`, beside the caller."""
        self._helping.append(None)
        try:
            self.do_some()
        finally:
            self._helping.pop()

    def end(self) -> None:
        """Begin no more runs, and wait for those of others, which write to what the caller may give away."""
        self.work = None
        while self._helping:
            time.sleep(POLL_SECONDS)

    def do_some(self) -> None:
        """Do runs until all are taken."""
        while (number := next(self._numbers)) < len(self._runs) and (work := self.work) is not None:
            self._outcomes.put(_failure_of(work, *self._runs[number]))

    def wait(self) -> None:
        """Block until all runs are done.

        Raises:
            BaseException: what the first of them raised that did.
        """
        outcomes = [self._outcomes.get() for _ in self._runs]
        for error in outcomes:
            if error is not None:
                raise error


def _failure_of(work: Work, first: int, end: int) -> BaseException | None:
    try:
        work(first, end)
    except BaseException as error:
        return error
    return None


class _Helpers:
    """The threads beside the calling one."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def offer(self, task: _Task, count: int) -> None:
        """Let `count` threads do some of `task`: fewer if the system starts no more."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(count - len(self._threads)):
            thread = threading.Thread(target=_help, args=(self._tasks,), name="airstream-products", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._threads.append(thread)
        for _ in range(count):
            self._tasks.put(task)

    def dismiss(self) -> None:
        """Have the threads end, and wait for it."""
        threads, tasks = self._threads, self._tasks
        self._threads, self._tasks = [], SimpleQueue()  # who has ended takes nothing out of the old one
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            if thread is not threading.current_thread():  # where a model may be collected
                thread.join(IDLE_SECONDS)


def _help(tasks: SimpleQueue[_Task | None]) -> None:
    with contextlib.suppress(Empty):
        while (task := tasks.get(timeout=IDLE_SECONDS)) is not None:
            task.help()
            del task  # it keeps a weight


_helpers: dict[int, _Helpers] = {}
"""By the process."""


def share(work: Work, rows: int, columns: int) -> None:
    """Call `work(first, end)` for runs of rows that are all of them together, at once.

    What the first of them raises is raised. If the caller is interrupted, it waits for what others have begun.
    """
    threads = torch.get_num_threads()
    count = max(1, min(threads * RUNS_EACH, rows, rows * columns // MIN_SHARE))
    beside = min(threads, count) - 1
    if not beside:
        work(0, rows)
        return
    task = _Task(work, [(rows * part // count, rows * (part + 1) // count) for part in range(count)])
    try:
        _helpers.setdefault(os.getpid(), _Helpers()).offer(task, beside)
        task.do_some()
        task.wait()
    except BaseException:
        task.end()
        raise
    task.work = None  # who comes too late finds nothing, and keeps nothing alive


def dismiss() -> None:
    """Have the threads end that wait for work. Whoever shares work later starts others."""
    if helpers := _helpers.get(os.getpid()):
        helpers.dismiss()
