"""Threads wait here until something changes, as with a `threading.Condition`, which an interrupt would break.

Ctrl-C raises KeyboardInterrupt between any two steps of the main thread's Python code. A Condition, and what is made of
one, enters, waits and leaves in Python code: interrupted there it keeps its lock for ever, or gives back a lock that it
does not have. A plain lock is taken and given back by `with` in one step. So nobody waits here while it is held.

It knows who waits. It refuses to know what for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FOREVER = -1.0
"""As locks have it."""


class Waiting:
    """The threads that wait for a change of what `lock` guards.

    Who finds, with the lock held, that there is something to wait for takes a ticket, lets go of the lock, and waits.

    Attributes:
        lock: may be taken again by the thread that has it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._tickets: list[threading.Lock] = []

    def ticket(self) -> threading.Lock:
        """For one wait of one thread, until the next call. The lock is held."""
        ticket = threading.Lock()
        ticket.acquire()
        self._tickets.append(ticket)
        return ticket

    def wait(self, ticket: threading.Lock, seconds: float = FOREVER) -> bool:
        """Block until there has been a call, at most so long; whether there has. The lock is not held."""
        return ticket.acquire(timeout=seconds)

    def call(self) -> None:
        """Wake all: something has changed. The lock is held. Whom an interrupt leaves asleep, the next call wakes."""
        for ticket in self._tickets:
            if ticket.locked():
                ticket.release()
        self._tickets = []

    def until(self, is_so: Callable[[], bool], seconds: float | None = None) -> bool:
        """Block until `is_so`, which is asked with the lock held, at most so long; whether it is."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            with self.lock:
                if is_so():
                    return True
                ticket = self.ticket()
            left = FOREVER if deadline is None else deadline - time.monotonic()
            if deadline is not None and left <= 0:
                return False
            self.wait(ticket, left)
