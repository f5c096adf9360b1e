"""`open_machinery` starts what moves the bytes of one model: a reader of its files, and the backend of its device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from airstream.reporting.probe import Probe
from airstream.reporting.stats import StreamStats
from airstream.transfer.backends import create_backend
from airstream.transfer.machinery import Machinery
from airstream.transfer.reader import CHUNK_BYTES, NUM_WORKERS, Reader


def open_machinery(files: Iterable[Path], device: torch.device, direct_io: bool, packed: bool) -> Machinery:
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
    return Machinery(reader, backend, probe, StreamStats())
