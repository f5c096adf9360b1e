"""A job is what a reader is asked to do: reads, or errands, that belong together.

It knows when all of them have ended, and whom to tell. It refuses to know what they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from airstream.system.waiting import FOREVER


class ReadCancelled(Exception):  # noqa: N818 - it is not an error: somebody asked for it
    """A job was cancelled before all of it had been read."""


OnDone = Callable[[BaseException | None], None]
"""What is called, once, by a reader thread, when a job has ended: with None, or with its first error."""

Errand = Callable[[int], None]
"""Something a reader thread does besides reading; it is given its number."""


class Outcome:
    """How a job ends, for a thread that waits for it. This is what to call when it has ended."""

    def __init__(self) -> None:
        self._has_ended = False
        self._wait = threading.Lock()  # an Event that is interrupted might keep its lock for ever
        self._wait.acquire()
        self._error: BaseException | None = None

    def __call__(self, error: BaseException | None) -> None:
        self._error, self._has_ended = error, True
        self._wait.release()

    def wait(self, seconds: float = FOREVER) -> bool:
        """Block until the job has ended, at most so long; whether it has. Raises its error. For one thread."""
        if not self._has_ended and not self._wait.acquire(timeout=seconds):
            return False
        if self._error is not None:
            raise self._error
        return True


class Job:
    """Reads, or errands, that belong together."""

    def __init__(self, num_steps: int, on_done: OnDone) -> None:
        self._on_done = on_done
        self._lock = threading.Lock()
        self._open = num_steps
        self._error: BaseException | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Skip what has not been read yet. `on_done` is still called, with ReadCancelled if anything was skipped."""
        self.cancelled = True

    @property
    def skips(self) -> bool:
        """Whether what is left of this job need not be read."""
        return self.cancelled or self._error is not None

    def finished_one(self, error: BaseException | None) -> None:
        """A step has ended, with `error` if it failed. The last one calls `on_done`, in its thread."""
        with self._lock:
            self._error = self._error or error
            self._open -= 1
            last = self._open == 0
        if last:
            on_done, self._on_done = self._on_done, _nothing  # an error's traceback refers to this job: no cycles
            on_done(self._error)


def _nothing(_: BaseException | None) -> None:
    pass
