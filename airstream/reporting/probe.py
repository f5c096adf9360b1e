"""A probe is told when work began, when it ended and how many bytes it moved, while somebody profiles.

It knows spans, and whether anybody listens. It refuses to know what becomes of them. With nobody listening, a report
costs one look at an attribute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

DISK, CONVERT, HOST_COPY, H2D = "disk", "convert", "host copy", "H2D"

PAGE_CACHE, HOST_MEMORY = "page cache", "host memory"
"""Where bytes come from that come from no disk: memory is faster, so that their rate is not the disk's."""

LINKS = (DISK, CONVERT, HOST_COPY, H2D)
"""What the bytes of a layer pass through on their way to where it computes, in that order."""

Moment = Any
"""A point in time: seconds of the clock `now`, or an event of a device, which becomes seconds once it has happened."""

now = time.perf_counter
"""The clock of every figure: monotonic wall time of the host, in seconds."""


class Span(NamedTuple):
    """Something that took time: on which track, what, from when to when, the bytes that it moved, and for what."""

    track: str
    kind: str
    start: Moment
    end: Moment
    nbytes: int = 0
    name: str = ""


class Listener(Protocol):
    """A listener profiles. The thread that computes reports what a model does, any thread reports spans and sizes."""

    def add(self, span: Span) -> None:
        """A span has ended, or, on a device, has been queued."""

    def ring_holds(self, nbytes: int) -> None:
        """So many bytes of the ring are taken from now on."""

    def begin_wait(self) -> None:
        """Computation asks for weights: nothing that it submits can go on before they are there."""

    def waited(self, read_bytes: int, host_bytes: int) -> None:
        """The layer batch that was asked for is there, or nothing but queued copies keeps it from that.

        The bytes are those that came from disk and from host memory to fill it, if this is the first use of that fill.
        """

    def waited_for_rows(self, nbytes: int) -> None:
        """The embedding rows that were asked for are there; so many bytes came from disk."""

    def begin_unit(self, name: str) -> None:
        """The module `name` begins to compute."""

    def end_unit(self) -> None:
        """It has ended, with a result or without."""


class Probe:
    """Reports to `listener`, if there is one. Passed to whatever does the work; may be switched at any time."""

    def __init__(self) -> None:
        self.listener: Listener | None = None

    def span(self, kind: str, nbytes: int, moment: Callable[[], Moment] = now) -> AbstractContextManager[Any]:
        """Around work of the calling thread; `moment` is asked when it begins and when it ends."""
        listener = self.listener
        return _NOTHING if listener is None else _Reporting(listener, _track(), kind, nbytes, moment)

    def queued(self, kind: str, nbytes: int, moment: Callable[[], Moment]) -> AbstractContextManager[Any]:
        """Around the queueing of device work, on the stream whose end is the `moment`."""
        listener = self.listener
        return _NOTHING if listener is None else _Reporting(listener, f"{kind} stream", kind, nbytes, moment)


class _Reporting:
    def __init__(self, listener: Listener, track: str, kind: str, nbytes: int, moment: Callable[[], Moment]) -> None:
        self._listener = listener
        self._about = track, kind
        self._nbytes = nbytes
        self._moment = moment

    def __enter__(self) -> None:
        self._start = self._moment()

    def __exit__(self, error: object, *_: object) -> None:
        nbytes = self._nbytes if error is None else 0
        self._listener.add(Span(*self._about, self._start, self._moment(), nbytes))


def _track() -> str:
    return threading.current_thread().name.removeprefix("airstream-")


_NOTHING: AbstractContextManager[Any] = nullcontext()
