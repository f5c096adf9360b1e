"""The accelerator backend copies what was read from small pinned staging buffers to the device, on a copy stream.

Each reader thread owns two staging buffers: while one is being copied, it reads into the other. So host memory does not
grow with the layers, a layer of any size streams through it, and disk and bus work at the same time within a layer.

It knows which copies and computations wait for which. It refuses to know what a device calls that: see `Runtime`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from airstream.reporting.probe import CONVERT, H2D, HOST_COPY, Moment, Probe
from airstream.transfer.base import Backend
from airstream.transfer.buffers import BUFFERS_PER_WORKER
from airstream.transfer.clock import DeviceClock
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.landing import HostLanding, Staging, cast_into, staged
from airstream.transfer.packing import DEVICE_PACKING
from airstream.transfer.piece import Cast, Piece
from airstream.transfer.pinning import Pinner, Pinning
from airstream.transfer.runtime import Runtime
from airstream.transfer.shortage import allocating

logger = logging.getLogger(__name__)


class AcceleratorBackend(Backend):
    """Slabs in device memory, filled by asynchronous copies, guarded by events.

    Two orders are kept without ever blocking the host: a computation waits for the copies that fill its slab
    (`wait_filled`), and copies wait for the last computation that was marked before they were queued (`begin_fill`).
    """

    packing = DEVICE_PACKING

    def __init__(
        self, runtime: Runtime, num_workers: int, chunk_bytes: int, probe: Probe | None = None, packed: bool = False
    ) -> None:
        self.device = runtime.device
        self._runtime = runtime
        self._clock = DeviceClock(runtime)
        self._bus = _Bus(runtime, self._clock, probe or Probe())
        self._computed = runtime.new_event()
        self._chunk_bytes = chunk_bytes
        self._staging = Staging(chunk_bytes, probe)
        self._pinner = Pinner()
        self._lanes: list[_Lane] = []
        with ExitStack() as failed:
            failed.callback(self.close)
            for _ in range(num_workers):
                self._lanes.append(_Lane(runtime, self._bus, chunk_bytes))
            if packed:
                self._bus.scratch = self.allocate(chunk_bytes + PAGE_BYTES)
            failed.pop_all()
        if not all(lane.pinned for lane in self._lanes):
            logger.warning("host memory could not be pinned: copies to %s will be slower", self.device)

    def allocate(self, nbytes: int, touch: bool = True) -> torch.Tensor:  # noqa: ARG002 - device memory never faults
        with allocating(nbytes, is_on_host=False):
            memory = self._runtime.empty(nbytes)
        self.mark_computed()  # the allocator may give memory that queued computations still use: copies wait for them
        return memory

    def landing(self, memory: torch.Tensor) -> DeviceLanding:
        return DeviceLanding(memory, self._lanes)

    def allocate_host(self, nbytes: int) -> HostedWeights:
        pinning = Pinning(self._runtime, buffer := HostBuffer(nbytes, touch=False))  # pinning touches it, too
        return HostedWeights(buffer, pinning, self._pinner, self._bus, self._lanes, self._chunk_bytes, self._staging)

    def wait_pinned(self) -> None:
        self._pinner.wait()

    def is_worker(self, thread: threading.Thread) -> bool:
        return self._pinner.is_worker(thread)

    def new_fence(self) -> Any:
        return self._runtime.new_event()

    def begin_fill(self) -> None:
        self._bus.stream.wait_event(self._computed)

    def end_fill(self, fence: Any) -> None:
        self._bus.stream.record_event(fence)

    def wait_filled(self, fence: Any) -> None:
        self._runtime.compute_stream().wait_event(fence)

    def mark_computed(self) -> None:
        self._runtime.compute_stream().record_event(self._computed)

    def moment(self) -> Moment:
        return self._clock.mark(self._runtime.compute_stream())

    def wait_computed(self) -> None:
        self._clock.wait()

    def start_clock(self) -> None:
        self._clock.anchor()

    def seconds(self, moments: Sequence[Moment]) -> list[float | None]:
        return self._clock.seconds(moments)

    def used_bytes(self) -> int:
        return self._runtime.used_bytes()

    def peak_bytes(self) -> int:
        return self._runtime.peak_bytes()

    def forget_peak(self) -> None:
        self._runtime.forget_peak()

    def synchronize(self) -> None:
        self._runtime.synchronize()

    def close(self) -> None:
        self._pinner.close()
        for lane in self._lanes:
            lane.close()
        self._lanes = []


class _Bus:
    """The copy stream. `probe` is told when each copy began and ended on the device.

    Attributes:
        scratch: device memory where packed weights arrive, if there are any.
    """

    scratch: torch.Tensor

    def __init__(self, runtime: Runtime, clock: DeviceClock, probe: Probe) -> None:
        self._lock = threading.Lock()
        self.stream = runtime.new_stream()
        self.probe = probe
        self._runtime = runtime
        self._moment = partial(clock.mark, self.stream)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy to the device. Does not block; `source` must stay as it is until it ran."""
        with self.probe.queued(H2D, source.numel(), self._moment):
            self._runtime.copy(destination, source, self.stream)

    def expand(self, destination: torch.Tensor, source: torch.Tensor, cast: Cast) -> None:
        """Queue a copy of packed `source` to the device and its decoding there. As `copy`.

        The stream does one after the other, so that all threads share one scratch, if each pair is queued together; and
        so that memory for decoding, which belongs to the stream, is needed once.
        """
        with self._lock:
            scratch = self.scratch[: source.numel()]
            self.copy(scratch, source)
            with self.probe.queued(CONVERT, source.numel(), self._moment):
                self._runtime.compute(destination, scratch, partial(cast_into, cast=cast), self.stream)


class DeviceLanding:
    """Lands pieces in `memory`, a uint8 device tensor, each through the lane of the thread that read it."""

    def __init__(self, memory: torch.Tensor, lanes: list[_Lane]) -> None:
        self._memory = memory
        self._lanes = lanes

    def window(self, worker: int, piece: Piece, direct: bool) -> memoryview:  # noqa: ARG002 - staging always fits
        """A staging buffer of this reader thread. Blocks until what was in it has been copied."""
        return self._lanes[worker].window(piece)

    def landed(self, worker: int, piece: Piece, direct: bool) -> None:  # noqa: ARG002
        """Queue the copy of `piece` from the staging buffer to the device."""
        self._lanes[worker].send(piece, self._memory[piece.target : piece.target + piece.target_bytes])


class HostedWeights:
    """Weights in host memory on their way to the device, pinned if the system allows it.

    Pinned, they are copied from where they lie. Until then, reader threads take them through their staging buffers, so
    that the thread that computes never waits for a copy, and nobody for the pinning, which begins with the reads.
    """

    def __init__(
        self,
        buffer: HostBuffer,
        pinning: Pinning,
        pinner: Pinner,
        bus: _Bus,
        lanes: list[_Lane],
        chunk_bytes: int,
        staging: Staging,
    ) -> None:
        self.nbytes = buffer.nbytes
        self._buffer = buffer
        self._pinning = pinning
        self._pinner = pinner
        self._bus = bus
        self._lanes = lanes
        self._chunk_bytes = chunk_bytes
        self._staging = staging
        self._is_submitted = False

    def landing(self) -> HostLanding:
        """Where the reads that fill this memory land. The first call asks for pinning. Does not block."""
        if not self._is_submitted:  # a read that failed is tried again
            self._is_submitted = True
            self._pinner.submit(self._pinning)
        return HostLanding(self._buffer.tensor, self._staging)

    def send(self, pairs: Sequence[tuple[torch.Tensor, int]]) -> list[Callable[[int], None]]:
        """Queue the copies at once if the memory is pinned; else give errands for reader threads."""
        if self._pinning.is_pinned:
            for target, start in pairs:
                self._bus.copy(target, self._buffer.tensor[start : start + target.numel()])
            return []
        return [
            partial(self._relay, target[done : done + self._chunk_bytes], start + done)
            for target, start in pairs
            for done in range(0, target.numel(), self._chunk_bytes)
        ]

    def _relay(self, target: torch.Tensor, start: int, worker: int) -> None:
        self._lanes[worker].relay(self._buffer.tensor[start : start + target.numel()], target)

    def close(self) -> None:
        """Undo the pinning. Idempotent."""
        self._pinning.undo()


class _Lane:
    """One reader thread's way to the device: two staging buffers, used in turn."""

    def __init__(self, runtime: Runtime, bus: _Bus, chunk_bytes: int) -> None:
        self._runtime = runtime
        self._bus = bus
        self._buffers = [HostBuffer(chunk_bytes + PAGE_BYTES) for _ in range(BUFFERS_PER_WORKER)]
        self._pinned = [runtime.pin(buffer) for buffer in self._buffers]
        self._sent = [runtime.new_event() for _ in self._buffers]
        self._cast: list[torch.Tensor | None] = [None] * BUFFERS_PER_WORKER
        self._turn = 0

    @property
    def pinned(self) -> bool:
        return all(self._pinned)

    def relay(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy `source`, in pageable host memory, to the device by way of a staging buffer."""
        self._next()
        staged = self._buffers[self._turn].tensor[: source.numel()]
        with self._bus.probe.span(HOST_COPY, source.numel()):
            staged.copy_(source)
        self._send(destination, staged)

    def _next(self) -> None:
        """Turn to the other buffer; blocks this reader thread until what was in it has been copied."""
        self._turn = (self._turn + 1) % BUFFERS_PER_WORKER
        self._sent[self._turn].synchronize()
        self._cast[self._turn] = None

    def window(self, piece: Piece) -> memoryview:
        self._next()
        return self._buffers[self._turn].view[staged(piece)]

    def send(self, piece: Piece, destination: torch.Tensor) -> None:
        source = self._buffers[self._turn].tensor[staged(piece)]
        if piece.cast is not None and piece.cast.is_blocks:
            self._bus.expand(destination, source, piece.cast)
            self._bus.stream.record_event(self._sent[self._turn])
            return
        if piece.cast is not None:
            raw, source = source, torch.empty(piece.target_bytes, dtype=torch.uint8)
            with self._bus.probe.span(CONVERT, piece.nbytes):
                cast_into(source, raw, piece.cast)
            self._cast[self._turn] = source  # must outlive the copy
        self._send(destination, source)

    def _send(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._bus.copy(destination, source)
        self._bus.stream.record_event(self._sent[self._turn])

    def close(self) -> None:
        for event, buffer, pinned in zip(self._sent, self._buffers, self._pinned, strict=True):
            event.synchronize()
            if pinned:
                self._runtime.unpin(buffer)
        self._buffers, self._pinned, self._sent = [], [], []
