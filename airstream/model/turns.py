"""This says who may use a model now: one thread at a time, in the order in which they asked.

A lock that is given back and asked for again by the same thread would mostly go to that thread: a long generation would
let nobody in between two passes. This one is handed to whoever has waited longest. An interrupt may keep a thread from
giving it back, in a `with` as well: then the turn ends with the work that it was taken for. It knows threads, not
models.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from airstream.system.forks import Forks
from airstream.system.frames import holder, is_on_stack

LOOK_SECONDS = 0.5
"""How often a thread that waits looks whether the one that has the turn still is at work."""

IsAtWork = Callable[[int], bool]
"""Whether the thread, given by number, still is at what it took the turn for."""


class _Ticket:
    """A thread that waits, or has the turn. Its lock is released when its turn has come."""

    def __init__(self, is_at_work: IsAtWork) -> None:
        self.thread = threading.get_ident()
        self.is_at_work = is_at_work
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
        self._owner: _Ticket | None = None  # set last, and cleared first
        self.depth = 0

    @property
    def is_taken(self) -> bool:
        """Whether any thread has the turn."""
        return self._owner is not None

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        owner = self._owner
        return owner is not None and owner.thread == threading.get_ident()

    def is_now(self, number: int) -> bool:
        """Whether the calling thread has the turn, and it is this one. What an interrupt has left may come later."""
        return self.is_mine and self.number == number

    @contextmanager
    def hold(self) -> Iterator[int]:
        """The turn, for as long as this lasts; gives its number. Blocks until it comes, the longest waiting first."""
        self.revoke_stale()
        depth = self.depth if self.is_mine else 0
        number = None
        try:
            self._take(partial(is_on_stack, holder()))
            number = self.number
            yield number
        finally:
            if number is None or self.is_now(number):
                self._return_to(depth)

    def enter(self, is_at_work: IsAtWork) -> None:
        """Take the turn where no `with` can be, as in hooks. Blocks. `leave` gives it back.

        If that is never called, the turn ends when `is_at_work` says so.
        """
        self.revoke_stale()
        self._take(is_at_work)

    def leave(self) -> None:
        """Give back what `enter` took."""
        if self.is_mine:
            self._return_to(self.depth - 1)

    def _take(self, is_at_work: IsAtWork) -> None:
        ticket = _Ticket(is_at_work)
        with self._lock:
            if self._owner is None:
                self._begin(ticket)
                return
            if self.is_mine:
                self.depth += 1
                return
            self._tickets.append(ticket)
        try:
            while not ticket.called.acquire(timeout=LOOK_SECONDS) and not self._is_called(ticket):
                pass
        except BaseException:  # an interrupt
            with self._lock:
                self._forget(ticket)
                if self._owner is ticket:  # the turn has come at the same moment
                    self._hand_over()
            raise
        with self._lock:
            self._forget(ticket)

    def _is_called(self, ticket: _Ticket) -> bool:
        """Whether the turn of `ticket` has come, seeing to it that turns go on, which interrupts may have ended."""
        self.revoke_stale()
        with self._lock:
            if self._owner is None:
                self._call_next()
            return self._owner is ticket

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
        if self._owner is not None:
            self._forget(self._owner)
        self._owner, self.depth = None, 0
        self._call_next()

    def _call_next(self) -> None:
        if self._tickets:
            ticket = self._tickets[0]  # which it leaves itself, when it knows
            self._begin(ticket)
            ticket.called.release()

    def _begin(self, ticket: _Ticket) -> None:
        self.depth, self.number = 1, self.number + 1
        self._owner = ticket

    def _forget(self, ticket: _Ticket) -> None:
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def revoke_stale(self) -> None:
        """Take the turn from a thread that has left its work without giving it back."""
        with self._lock:
            owner = self._owner
            if owner is not None and not owner.is_at_work(owner.thread):
                self._hand_over()
