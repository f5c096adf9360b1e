"""The generations under way, which take turns between passes: what each holds of the memory, and who waits for whom.

Each is begun only if its KV cache, up to its end, fits beside those of the others; else it waits for one of them to end.
What would wait for itself is refused: a call from inside another generation that has to end first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from airstream.errors import AirstreamError
from airstream.plan import Workload
from airstream.turns import Turns

PATIENCE_SECONDS = 30.0
"""How long a call waits for generations that make no pass: they may be waiting for it."""

Obstacle = Callable[[Workload | None, int, bool], AirstreamError | None]
"""Why `work` cannot be done beside KV caches of so many bytes and, if True, generations of other threads."""


@dataclass(slots=True, eq=False)
class Generation:
    """One call of `generate`.

    Attributes:
        kv_bytes: of its KV cache at its end, as far as that is known.
        has_cache: its passes are given a KV cache.
        is_waiting: for another one to end.
    """

    thread: int
    kv_bytes: int
    has_cache: bool = False
    is_waiting: bool = False


class Generations:
    """Those of one model.

    Args:
        guard: whose turn it is to use the model.
        obstacle: decides what is possible; asked while the turn is held.
    """

    def __init__(self, turns: Turns, guard: Callable[[], AbstractContextManager[None]], obstacle: Obstacle) -> None:
        self._turns = turns
        self._guard = guard
        self._obstacle = obstacle
        self._all: list[Generation] = []
        self._ended = threading.Condition()
        self._num_passes = 0

    def after_fork(self) -> None:
        """In a forked child: those that were under way are the parent's."""
        self._all = []
        self._ended = threading.Condition()

    @contextmanager
    def one(
        self, work: Workload | None, kv_bytes: Callable[[Workload], int], begin: Callable[[Workload | None], None]
    ) -> Iterator[None]:
        """Around a generation that asks for `work` at its end. Waits until it fits.

        Args:
            kv_bytes: what is set aside for its KV cache from the beginning.
            begin: called with the turn held, and with what is beside it in `work`.
        """
        mine: Generation | None = None
        try:
            with self._once_possible(None, work) as beside:
                begin(beside)
                mine = Generation(threading.get_ident(), kv_bytes(work) if work is not None else 0)
                self._all.append(mine)
            yield
        finally:
            if mine in self._all:
                self._all.remove(mine)
            self.wake()

    @contextmanager
    def one_pass(
        self, work: Workload | None, has_cache: bool, kv_bytes: Callable[[Workload], int]
    ) -> Iterator[Workload | None]:
        """Around a pass, with the turn. Gives `work` with what is beside it. Waits until it fits."""
        mine = self._mine(work, has_cache)
        with self._once_possible(mine, work) as beside:
            if mine is not None and work is not None:
                mine.kv_bytes = max(mine.kv_bytes, kv_bytes(work))
            self._num_passes += 1
            yield beside

    def wake(self) -> None:
        """Something has changed for those who wait."""
        with self._ended:
            self._ended.notify_all()

    def _mine(self, work: Workload | None, has_cache: bool) -> Generation | None:
        """The generation that a pass of the calling thread belongs to, if it is not a call from inside of it."""
        mine = next((one for one in reversed(tuple(self._all)) if one.thread == threading.get_ident()), None)
        if mine is not None and work is not None:
            if mine.has_cache and not has_cache:
                return None
            mine.has_cache |= has_cache
        return mine

    @contextmanager
    def _once_possible(self, mine: Generation | None, work: Workload | None) -> Iterator[Workload | None]:
        while True:
            with self._guard():
                others = [one for one in self._all if one is not mine]
                nbytes = sum(one.kv_bytes for one in others)
                elsewhere = any(one.thread != threading.get_ident() for one in others)
                obstacle = self._obstacle(work, nbytes, elsewhere) if others else None
                if obstacle is None:
                    yield replace(work, beside_bytes=nbytes) if work is not None else None
                    return
                is_inside = any(one.thread == threading.get_ident() for one in others) or self._turns.depth > 1
                if is_inside or all(one.is_waiting for one in others):
                    raise obstacle
                if mine is not None:
                    mine.is_waiting = True
            self._wait(mine, others, obstacle)

    def _wait(self, mine: Generation | None, others: list[Generation], obstacle: AirstreamError) -> None:
        """Until one of the `others` has ended."""
        try:
            with self._ended:
                seen = self._num_passes
                while all(one in self._all for one in others):
                    woken = self._ended.wait(PATIENCE_SECONDS)
                    if woken:
                        return  # and look again: one has ended, or the model was closed
                    if seen == self._num_passes and not self._turns.is_taken:
                        raise obstacle
                    seen = self._num_passes
        finally:
            if mine is not None:
                mine.is_waiting = False
