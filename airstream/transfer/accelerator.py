"""The accelerator backend copies what was read from small pinned staging buffers to the device, on a copy stream.

Each reader thread owns two staging buffers: while one is being copied, it reads into the other. So host memory does not
grow with the layers, a layer of any size streams through it, and disk and bus work at the same time within a layer.

It knows which copies and computations wait for which. It refuses to know what a device calls that: see `Runtime`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain

import torch

from airstream.reporting.probe import Moment, Probe
from airstream.transfer.base import Backend
from airstream.transfer.buffers import SCRATCHES
from airstream.transfer.bus import Bus, Lane
from airstream.transfer.clock import DeviceClock
from airstream.transfer.crossing import Crossing
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.landing import HostLanding, Staging
from airstream.transfer.packing import DEVICE_PACKING
from airstream.transfer.piece import Piece
from airstream.transfer.pinning import Pinner, Pinning
from airstream.transfer.runtime import Event, Runtime
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
        self._bus = Bus(runtime, self._clock, probe or Probe())
        self._computed = runtime.new_event()
        self._chunk_bytes = chunk_bytes
        self._staging = Staging(chunk_bytes, probe)
        self._pinner = Pinner()
        self._lanes: list[Lane] = []
        with ExitStack() as failed:
            failed.callback(self.close)
            for _ in range(num_workers):
                self._lanes.append(Lane(runtime, self._bus, chunk_bytes))
            if packed:
                self._bus.decode_in([self.allocate(chunk_bytes + PAGE_BYTES) for _ in range(SCRATCHES)])
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

    def new_fence(self) -> list[Event]:
        return self._bus.new_fence()

    def begin_fill(self) -> None:
        self._bus.begin(self._computed)

    def end_fill(self, fence: Sequence[Event]) -> None:
        self._bus.end(fence)

    def wait_filled(self, fence: Sequence[Event]) -> None:
        for event in fence:
            self._runtime.compute_stream().wait_event(event)

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
        self._bus.close()


class DeviceLanding:
    """Lands pieces in `memory`, a uint8 device tensor, each through the lane of the thread that read it."""

    def __init__(self, memory: torch.Tensor, lanes: list[Lane]) -> None:
        self._memory = memory
        self._lanes = lanes

    def window(self, worker: int, piece: Piece, direct: bool) -> memoryview:
        """A staging buffer of this reader thread. Blocks until what was in it has been copied."""
        return self._lanes[worker].window(piece, direct)

    def landed(self, worker: int, piece: Piece, direct: bool) -> None:  # noqa: ARG002
        """Queue the copy of `piece` from the staging buffer to the device."""
        self._lanes[worker].send(piece, self._memory[piece.target : piece.target + piece.target_bytes])


class HostedWeights:
    """Weights in host memory on their way to the device, pinned if the system allows it; packed ones are decoded there.

    Pinned, they are copied from where they lie. Until then, reader threads take them through their staging buffers, so
    that the thread that computes never waits for a copy, and nobody for the pinning, which begins with the reads.
    """

    def __init__(
        self,
        buffer: HostBuffer,
        pinning: Pinning,
        pinner: Pinner,
        bus: Bus,
        lanes: list[Lane],
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

    def send(self, memory: torch.Tensor, crossings: Sequence[Crossing]) -> list[Callable[[int], None]]:
        """If the host memory is pinned, queue plain copies at once; give errands for reader threads for all else.

        Decoding is dozens of operations a chunk, and the thread that computes has its own to queue.
        """
        if not self._pinning.is_pinned:
            return [partial(self._relay, memory, chunk) for chunk in self._chunks(crossings)]
        for crossing in crossings:
            if crossing.cast is None:
                self._bus.copy(*self._ends(memory, crossing))
        packed = (crossing for crossing in crossings if crossing.cast is not None)
        return [partial(self._cross, memory, chunk) for chunk in self._chunks(packed)]

    def _chunks(self, crossings: Iterable[Crossing]) -> Iterator[Crossing]:
        return chain.from_iterable(crossing.chunks(self._chunk_bytes) for crossing in crossings)

    def _cross(self, memory: torch.Tensor, crossing: Crossing, worker: int) -> None:  # noqa: ARG002 - from where it lies
        self._bus.cross(*self._ends(memory, crossing), crossing.cast)

    def _relay(self, memory: torch.Tensor, crossing: Crossing, worker: int) -> None:
        self._lanes[worker].relay(*self._ends(memory, crossing), crossing.cast)

    def _ends(self, memory: torch.Tensor, crossing: Crossing) -> tuple[torch.Tensor, torch.Tensor]:
        """Where `crossing` ends, in `memory`, and where it begins."""
        target, source = crossing.target, crossing.source
        return memory[target : target + crossing.target_bytes], self._buffer.tensor[source : source + crossing.nbytes]

    def close(self) -> None:
        """Undo the pinning. Idempotent."""
        self._pinning.undo()
