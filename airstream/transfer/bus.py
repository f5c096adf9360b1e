"""The bus is how bytes get to a device, and a lane one reader thread's way to it, through pinned staging buffers.

What is packed crosses packed and is decoded on the device. This knows which copies wait for which. It refuses to know
who computes, and what has to come.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from airstream.reporting.probe import CONVERT, H2D, HOST_COPY, Probe
from airstream.reporting.units import round_up
from airstream.transfer.buffers import BUFFERS_PER_WORKER
from airstream.transfer.clock import DeviceClock
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.landing import cast_into, read_to, staged
from airstream.transfer.piece import Cast, Piece
from airstream.transfer.runtime import Event, Runtime


class Bus:
    """The copy stream of a device, and, if weights are packed, one more that decodes what has crossed packed.

    While one chunk is decoded the next one is copied, so that the bus need not wait. Fences are behind both streams.
    `probe` is told when each copy and each decoding began and ended on the device.
    """

    def __init__(self, runtime: Runtime, clock: DeviceClock, probe: Probe) -> None:
        self.stream = runtime.new_stream()
        self.probe = probe
        self._lock = threading.Lock()
        self._runtime = runtime
        self._clock = clock
        self._streams = [self.stream]
        self._scratches: list[_Scratch] = []
        self._turn = 0
        self._decoded = runtime.new_event()

    def decode_in(self, memories: Iterable[torch.Tensor]) -> None:
        """From now on packed bytes may cross, to `memories` on the device in turn."""
        self._scratches = [_Scratch(each, self._runtime.new_event(), self._runtime.new_event()) for each in memories]
        self._streams.append(self._runtime.new_stream())

    def new_fence(self) -> list[Event]:
        """Events to be given to `end`."""
        return [self._runtime.new_event() for _ in self._streams]

    def begin(self, event: Event) -> None:
        """Order what is queued from now on behind `event`, and copies behind what is decoded: it may be given up."""
        for stream in self._streams:
            stream.wait_event(event)
        for decoder in self._streams[1:]:
            decoder.record_event(self._decoded)
            self.stream.wait_event(self._decoded)

    def end(self, fence: Sequence[Event]) -> None:
        """Put `fence` behind all that is queued."""
        for stream, event in zip(self._streams, fence, strict=True):
            stream.record_event(event)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy to the device. Does not block; `source` must stay as it is until it ran."""
        with self.probe.queued(H2D, source.numel(), partial(self._clock.mark, self.stream)):
            self._runtime.copy(destination, source, self.stream)

    def cross(self, destination: torch.Tensor, source: torch.Tensor, cast: Cast | None) -> None:
        """As `expand` if there is a `cast`, else as `copy`."""
        if cast is None:
            self.copy(destination, source)
        else:
            self.expand(destination, source, cast)

    def expand(self, destination: torch.Tensor, source: torch.Tensor, cast: Cast) -> None:
        """Queue a copy of packed `source` to the device and its decoding there. As `copy`.

        All threads share the scratches, if each pair is queued together. The decoder does one after the other, so that
        memory for decoding, which belongs to that stream, is needed once.
        """
        with self._lock:
            self._turn = (self._turn + 1) % len(self._scratches)
            scratch, decoder = self._scratches[self._turn], self._streams[-1]
            packed = scratch.memory[: source.numel()]
            self.stream.wait_event(scratch.is_free)
            self.copy(packed, source)
            self.stream.record_event(scratch.is_full)
            decoder.wait_event(scratch.is_full)
            with self.probe.queued(CONVERT, source.numel(), partial(self._clock.mark, decoder)):
                self._runtime.compute(destination, packed, partial(cast_into, cast=cast), decoder)
            decoder.record_event(scratch.is_free)

    def close(self) -> None:
        """Give the scratches back. Idempotent; blocks while something is being decoded."""
        for decoder in self._streams[1:]:
            decoder.record_event(self._decoded)
        self._decoded.synchronize()
        self._scratches = []


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Device memory where packed bytes arrive; the events that they are there, and that they have been decoded."""

    memory: torch.Tensor
    is_full: Event
    is_free: Event


class Lane:
    """One reader thread's way to the device: two staging buffers, used in turn."""

    def __init__(self, runtime: Runtime, bus: Bus, chunk_bytes: int) -> None:
        self._runtime = runtime
        self._bus = bus
        self._buffers = [HostBuffer(round_up(chunk_bytes + PAGE_BYTES, PAGE_BYTES)) for _ in range(BUFFERS_PER_WORKER)]
        self._pinned = [runtime.pin(buffer) for buffer in self._buffers]
        self._sent = [runtime.new_event() for _ in self._buffers]
        self._cast: list[torch.Tensor | None] = [None] * BUFFERS_PER_WORKER
        self._turn = 0

    @property
    def pinned(self) -> bool:
        """Whether the system has pinned both buffers."""
        return all(self._pinned)

    def relay(self, destination: torch.Tensor, source: torch.Tensor, cast: Cast | None) -> None:
        """Copy `source`, in pageable host memory, to the device by way of a staging buffer; `cast` it there."""
        self._next()
        staged = self._buffers[self._turn].tensor[: source.numel()]
        with self._bus.probe.span(HOST_COPY, source.numel()):
            staged.copy_(source)
        self._send(destination, staged, cast)

    def _next(self) -> None:
        """Turn to the other buffer; blocks this reader thread until what was in it has been copied."""
        self._turn = (self._turn + 1) % BUFFERS_PER_WORKER
        self._sent[self._turn].synchronize()
        self._cast[self._turn] = None

    def window(self, piece: Piece, direct: bool) -> memoryview:
        """Where `piece` is to be read to. Blocks until what was there has been copied."""
        self._next()
        return self._buffers[self._turn].view[read_to(piece, direct)]

    def send(self, piece: Piece, destination: torch.Tensor) -> None:
        """Queue the copy of `piece`, which has been read; blocks are decoded on the device, other numbers cast here."""
        source = self._buffers[self._turn].tensor[staged(piece)]
        on_device = piece.cast if piece.cast is not None and piece.cast.is_blocks else None
        if piece.cast is not None and on_device is None:
            raw, source = source, torch.empty(piece.target_bytes, dtype=torch.uint8, device="cpu")
            with self._bus.probe.span(CONVERT, piece.nbytes):
                cast_into(source, raw, piece.cast)
            self._cast[self._turn] = source  # must outlive the copy
        self._send(destination, source, on_device)

    def _send(self, destination: torch.Tensor, source: torch.Tensor, cast: Cast | None) -> None:
        self._bus.cross(destination, source, cast)
        self._bus.stream.record_event(self._sent[self._turn])

    def close(self) -> None:
        """Give the buffers back. Idempotent; blocks for copies under way."""
        for event, buffer, pinned in zip(self._sent, self._buffers, self._pinned, strict=True):
            event.synchronize()
            if pinned:
                self._runtime.unpin(buffer)
        self._buffers, self._pinned, self._sent = [], [], []
