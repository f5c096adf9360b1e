"""The machinery moves the bytes of one model: the reader, the backend, and the two that note what they do.

It knows how they are closed together. It refuses to know how they were opened, which bytes they move, and in which
order.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from airstream.reporting.probe import Probe
from airstream.reporting.stats import StreamStats
from airstream.transfer.base import Backend
from airstream.transfer.reader import Reader


@dataclass(frozen=True, slots=True)
class Machinery:
    """Everything that has threads, pinned memory or open files.

    Attributes:
        probe: is told by `reader` and `backend` what they do.
        stats: counts what has been streamed.
    """

    reader: Reader
    backend: Backend
    probe: Probe
    stats: StreamStats

    def is_worker(self, thread: threading.Thread) -> bool:
        """Whether `close` would wait for `thread`."""
        return self.reader.is_worker(thread) or self.backend.is_worker(thread)

    def close(self) -> None:
        """End all threads and give all memory back. Blocks for reads under way. Idempotent."""
        try:
            self.reader.close()
        finally:
            self.backend.close()
