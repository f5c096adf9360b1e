"""The machinery moves the bytes of one model: the reader, the backend, and the two that note what they do.

It knows how they are opened and closed together. It refuses to know which bytes they move, and in which order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from airstream.reporting.probe import Probe
from airstream.reporting.stats import StreamStats
from airstream.transfer.backends import create_backend
from airstream.transfer.base import Backend
from airstream.transfer.reader import CHUNK_BYTES, NUM_WORKERS, Reader


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

    @classmethod
    def open(cls, files: Iterable[Path], device: torch.device, direct_io: bool, packed: bool) -> Machinery:
        """Start reader threads for `files`, and a backend for `device`.

        Args:
            direct_io: whether reads go around the page cache.
            packed: whether there are weights that are decoded on their way.
        """
        probe = Probe()
        reader = Reader(files, direct_io, probe=probe)
        try:
            backend = create_backend(device, NUM_WORKERS, CHUNK_BYTES, probe, packed=packed)
        except BaseException:
            reader.close()
            raise
        return cls(reader, backend, probe, StreamStats())

    def is_worker(self, thread: threading.Thread) -> bool:
        """Whether `close` would wait for `thread`."""
        return self.reader.is_worker(thread) or self.backend.is_worker(thread)

    def close(self) -> None:
        """End all threads and give all memory back. Blocks for reads under way. Idempotent."""
        try:
            self.reader.close()
        finally:
            self.backend.close()
