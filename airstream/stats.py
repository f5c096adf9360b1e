"""How much has been streamed, and how long computation waited for it: sums since the model was loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StreamStats:
    """What the streamer has done so far.

    Attributes:
        streamed_bytes: read from disk: into the ring, and once for what then stays in memory.
        host_bytes: copied to the device from host memory.
        stall_seconds: wall time in which `acquire` waited for bytes.
        read_seconds: wall time in which at least one batch was being read.
        acquired: batches handed out.
        missed: of those, the ones whose read had not even been started.
        layers: have begun to compute, those in memory included.
    """

    streamed_bytes: int = 0
    host_bytes: int = 0
    stall_seconds: float = 0.0
    read_seconds: float = 0.0
    acquired: int = 0
    missed: int = 0
    layers: int = 0
