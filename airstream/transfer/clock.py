"""The clock says when a device did what: it gives points in its streams as seconds of the host's clock.

A host clock around asynchronous work measures how long it takes to queue it. Here events are queued with the work, and
read once the device has passed them; an event that the host has waited for ties the two clocks together.

It knows events and streams. It refuses to know what is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airstream.reporting.probe import Moment, now
from airstream.transfer.runtime import Runtime


class DeviceClock:
    """Marks in streams of `runtime`. Its events are used again, so that profiling allocates none in the long run."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._spare: list[Any] = []
        self._anchor: Any = None
        self._anchored_at = 0.0

    def mark(self, stream: Any) -> Any:
        """The point that the work queued in `stream` so far leads to. Does not block."""
        try:
            event = self._spare.pop()  # by any thread: no looking first
        except IndexError:
            event = self._runtime.new_timer()
        stream.record_event(event)
        return event

    def wait(self) -> None:
        """Block until what the calling thread has computed so far is done."""
        event = self.mark(self._runtime.compute_stream())
        event.synchronize()
        self._spare.append(event)

    def anchor(self) -> None:
        """Tie the device's clock to the host's, afresh as they drift apart. Blocks until what was computed is done."""
        self.wait()  # after that, an event is passed as soon as it is queued
        before, self._anchor = self._anchor, self.mark(self._runtime.compute_stream())
        self._anchor.synchronize()
        self._anchored_at = now()
        if before is not None:
            self._spare.append(before)

    def seconds(self, moments: Sequence[Moment]) -> list[float | None]:
        """Each of `moments` on the host's clock, None for what has not happened yet.

        The others have been dealt with: their events are used again.
        """
        return [moment if isinstance(moment, float) else self._seconds(moment) for moment in moments]

    def _seconds(self, event: Any) -> float | None:
        if not event.query():
            return None
        seconds = self._anchored_at + self._runtime.elapsed_seconds(self._anchor, event)
        self._spare.append(event)
        return seconds
