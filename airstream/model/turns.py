"""This says who may use a model now: one thread at a time, in the order in which they asked.

A lock that is given back and asked for again by the same thread would mostly go to that thread: a long generation would
let nobody in between two passes. This one is handed to whoever has waited longest. It knows threads, not models.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from airstream.system.forks import Forks

LOOK_SECONDS = 0.5
"""How often a thread that waits for one that has the turn without a `with` looks whether it still is at work."""


class _Ticket:
    """A thread that waits. Its lock is released when its turn has come."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.called = threading.Lock()
        self.called.acquire()


class Turns:
    """A fair lock. The thread that has the turn may take it again, and gives it back as often.

    Attributes:
        depth: how often the thread that has the turn has taken it.
        number: which turn this is, of all that there were.
    """

    def __init__(self) -> None:
        self.number = 0
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: the threads that waited, or had the turn, are the parent's."""
        self._forks = Forks()
        self._lock = threading.Lock()
        self._tickets: deque[_Ticket] = deque()
        self._owner: int | None = None
        self.depth = 0
        self._is_at_work: Callable[[int], bool] | None = None

    @property
    def is_taken(self) -> bool:
        """Whether any thread has the turn."""
        return self._owner is not None

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        return self._owner == threading.get_ident()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """The turn, for as long as this lasts. Blocks until it comes, the longest waiting first."""
        self.revoke_stale()
        depth = self.depth if self.is_mine else 0
        try:
            self._take()
            yield
        finally:
            self._return_to(depth)

    def enter(self, is_at_work: Callable[[int], bool]) -> None:
        """Take the turn where no `with` can be, as in hooks. Blocks. `leave` gives it back.

        An interrupt may keep `leave` from being called: then the turn ends with what `is_at_work`, given the thread,
        denies.
        """
        self.revoke_stale()
        self._take()
        if self.depth == 1:
            self._is_at_work = is_at_work

    def leave(self) -> None:
        """Give back what `enter` took."""
        if self.is_mine:
            self._return_to(self.depth - 1)

    def _take(self) -> None:
        with self._lock:
            if self._owner is None:
                self._begin(threading.get_ident())
                return
            if self.is_mine:
                self.depth += 1
                return
            ticket = _Ticket()
            self._tickets.append(ticket)
        try:
            while not ticket.called.acquire(timeout=LOOK_SECONDS):
                self.revoke_stale()
        except BaseException:  # an interrupt
            with self._lock:
                if ticket in self._tickets:
                    self._tickets.remove(ticket)
                elif self.is_mine:  # the turn has come at the same moment
                    self._hand_over()
            raise

    def _return_to(self, depth: int) -> None:
        if self._forks.is_child:
            return  # forked meanwhile: there is another one here
        with self._lock:
            if not self.is_mine:
                return  # an interrupt has kept it from coming
            self.depth = depth
            if not depth:
                self._hand_over()

    def _hand_over(self) -> None:
        self._owner, self.depth, self._is_at_work = None, 0, None
        if self._tickets:
            ticket = self._tickets.popleft()
            self._begin(ticket.thread)
            ticket.called.release()

    def _begin(self, thread: int) -> None:
        self._owner, self.depth, self.number = thread, 1, self.number + 1

    def revoke_stale(self) -> None:
        """Take the turn from a thread that has left its work without giving it back."""
        with self._lock:
            is_at_work, owner = self._is_at_work, self._owner
            if is_at_work is not None and owner is not None and not is_at_work(owner):
                self._hand_over()


def is_on_stack(wanted: FrameType, thread: int) -> bool:
    """Whether `thread` has not left the call whose frame is `wanted`."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None
