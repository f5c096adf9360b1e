"""This notices that the process is a fork of the one in which something was made: threads and locks do not cross.

It registers nothing with the interpreter: whoever owns threads asks, which costs a tenth of a microsecond. It refuses
to know what has to be made anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

BORN_AS = os.getpid()
"""The process in which airstream was imported: a fork of it has another number."""

FORKED_INSIDE = (
    "this process was forked in the middle of a pass of the model, whose other half is in the parent: fork between two "
    "calls, load the model in the child, or start it with multiprocessing's 'spawn'"
)


def is_forked() -> bool:
    """Whether this process is a fork of one that had imported airstream, and may have computed."""
    return os.getpid() != BORN_AS


class Forks:
    """What one owner of threads asks."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._locks: dict[int, threading.Lock] = {}

    @property
    def is_child(self) -> bool:
        """Whether this is a fork of the process in which `restart_in_child` was called last, or this was made."""
        return self._pid != os.getpid()

    def restart_in_child(self, restart: Callable[[], None]) -> None:
        """In a child, `restart`, once, whichever thread comes first; what it raises, it raises each time."""
        if not self.is_child:
            return
        with self._locks.setdefault(os.getpid(), threading.Lock()):  # one that no thread of the parent can hold
            if self.is_child:
                restart()
                self._pid = os.getpid()
