"""This counts how much has been streamed, from where, how fast, and how long computation waited for it.

It knows bytes and seconds that others have measured. It refuses to give a rate where nothing has passed.
"""

from __future__ import annotations

from dataclasses import dataclass

from airstream.reporting.probe import DISK, HOST_MEMORY, now
from airstream.reporting.units import format_bytes, format_rate, format_seconds


@dataclass(slots=True)
class StreamStats:
    """What the streamer has done so far: sums since the model was loaded.

    Attributes:
        streamed_bytes: read from `source`: into the ring, and once for what then stays in memory.
        host_bytes: copied to the device from host memory.
        stall_seconds: wall time in which computation waited for reads. A device waits for copies itself: see profiles.
        read_seconds: wall time in which at least one batch was being read.
        acquired: batches handed out.
        missed: of those, the ones whose read had not even been started.
        layers: have begun to compute, those in memory included.
        source: "disk", or "page cache" if the last of the reads went through it.
    """

    streamed_bytes: int = 0
    host_bytes: int = 0
    stall_seconds: float = 0.0
    read_seconds: float = 0.0
    acquired: int = 0
    missed: int = 0
    layers: int = 0
    source: str = DISK


@dataclass(frozen=True, slots=True)
class MeasuredLink:
    """What streaming runs at if computation takes no time: one pass over all that is streamed, without computing.

    Attributes:
        link: where the bytes came from: "disk", "page cache", "host memory", or "disk and host memory". All of them
            arrived where the model computes: the rate is that of the whole way. None if nothing is streamed.
        nbytes: the bytes that arrived.
        seconds: wall time until the last of them had.
    """

    link: str | None
    nbytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float | None:
        """None if nothing is streamed: there is no link to have a rate."""
        return self.nbytes / self.seconds if self.nbytes else None

    def __str__(self) -> str:
        rate = self.bytes_per_second
        if rate is None:
            return "nothing is streamed: all weights stay where they compute"
        return f"{format_rate(rate)} from {self.link} ({format_bytes(self.nbytes)} in {format_seconds(self.seconds)})"


class LinkMeter:
    """Measures what moves from when it is made on. Whoever asks has waited until nothing moves, before and after."""

    def __init__(self, stats: StreamStats) -> None:
        self._stats = stats
        self._before = stats.streamed_bytes, stats.host_bytes
        self._started = now()

    def measured(self) -> MeasuredLink:
        """What has moved since then."""
        seconds = now() - self._started
        read_bytes, host_bytes = self._before
        moved = {
            self._stats.source: self._stats.streamed_bytes - read_bytes,
            HOST_MEMORY: self._stats.host_bytes - host_bytes,
        }
        sources = [source for source, nbytes in moved.items() if nbytes]
        return MeasuredLink(" and ".join(sources) or None, sum(moved.values()), seconds)


class ReadClock:
    """Keeps `read_seconds` of `stats`: the time in which at least one batch is being read. Not for several threads."""

    def __init__(self, stats: StreamStats) -> None:
        self._stats = stats
        self._since = 0.0
        self.num_reading = 0

    def count(self, change: int) -> None:
        """So many batches more are being read from now on."""
        time = now()
        if self.num_reading:
            self._stats.read_seconds += time - self._since
        self._since = time
        self.num_reading += change
