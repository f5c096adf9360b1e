"""The accelerator backend: reads land in small pinned staging buffers and cross to the device on a copy stream.

Each reader thread owns two staging buffers: while one is being copied, it reads into the other. So host memory does
not grow with the layers, a layer of any size streams through it, and disk and bus work at the same time within a layer.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from airstream.backend.base import Backend, Packing, Runtime
from airstream.backend.host_memory import HostBuffer
from airstream.backend.landing import cast_into
from airstream.checkpoint.files import PAGE_BYTES
from airstream.checkpoint.reader import Piece

logger = logging.getLogger(__name__)

BUFFERS_PER_WORKER = 2


class AcceleratorBackend(Backend):
    """Slabs in device memory, filled by asynchronous copies, guarded by events.

    Two orders are kept without ever blocking the host: a computation waits for the copies that fill its slab
    (`wait_filled`), and copies wait for the last computation that was released before they were queued (`begin_fill`).
    """

    # 256 bytes is what device allocators give and what matrix kernels ask about when they choose an algorithm.
    packing = Packing(follows_file=False, alignment=256)

    def __init__(self, runtime: Runtime, num_workers: int, chunk_bytes: int) -> None:
        self.device = runtime.device
        self._runtime = runtime
        self._copies = runtime.new_stream()
        self._computed = runtime.new_event()
        self._lanes = [_Lane(runtime, self._copies, chunk_bytes) for _ in range(num_workers)]
        pinned = [lane.pinned for lane in self._lanes]
        if not all(pinned):
            logger.warning("host memory could not be pinned: copies to %s will be slower", self.device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        memory = self._runtime.empty(nbytes)
        self.release()  # the allocator may hand out memory that queued computations still use: copies wait for them
        return memory

    def landing(self, memory: torch.Tensor) -> DeviceLanding:
        return DeviceLanding(memory, self._lanes)

    def new_fence(self) -> Any:
        return self._runtime.new_event()

    def begin_fill(self) -> None:
        self._copies.wait_event(self._computed)

    def end_fill(self, fence: Any) -> None:
        self._copies.record_event(fence)

    def wait_filled(self, fence: Any) -> None:
        self._runtime.compute_stream().wait_event(fence)

    def release(self) -> None:
        self._runtime.compute_stream().record_event(self._computed)

    def synchronize(self) -> None:
        self._runtime.synchronize()

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes = []


class DeviceLanding:
    """Lands pieces in `memory`, a uint8 device tensor, each through the lane of the thread that read it."""

    def __init__(self, memory: torch.Tensor, lanes: list[_Lane]) -> None:
        self._memory = memory
        self._lanes = lanes

    def window(self, worker: int, piece: Piece, direct: bool) -> memoryview:  # noqa: ARG002 - staging always fits
        return self._lanes[worker].window(piece)

    def landed(self, worker: int, piece: Piece, direct: bool) -> None:  # noqa: ARG002
        self._lanes[worker].send(piece, self._memory[piece.target : piece.target + piece.target_bytes])


class _Lane:
    """One reader thread's way to the device: two staging buffers, used in turn."""

    def __init__(self, runtime: Runtime, copies: Any, chunk_bytes: int) -> None:
        self._runtime = runtime
        self._copies = copies
        self._buffers = [HostBuffer(chunk_bytes + PAGE_BYTES) for _ in range(BUFFERS_PER_WORKER)]
        self._pinned = [runtime.pin(buffer) for buffer in self._buffers]
        self._sent = [runtime.new_event() for _ in self._buffers]
        self._cast: list[torch.Tensor | None] = [None] * BUFFERS_PER_WORKER
        self._turn = 0

    @property
    def pinned(self) -> bool:
        return all(self._pinned)

    def window(self, piece: Piece) -> memoryview:
        self._turn = (self._turn + 1) % BUFFERS_PER_WORKER
        self._sent[self._turn].synchronize()  # blocks this reader thread only
        self._cast[self._turn] = None
        phase = piece.offset % PAGE_BYTES
        return self._buffers[self._turn].view[phase : phase + piece.nbytes]

    def send(self, piece: Piece, destination: torch.Tensor) -> None:
        phase = piece.offset % PAGE_BYTES
        source = self._buffers[self._turn].tensor[phase : phase + piece.nbytes]
        if piece.cast is not None:
            raw, source = source, torch.empty(piece.target_bytes, dtype=torch.uint8)
            cast_into(source, raw, piece.cast)
            self._cast[self._turn] = source  # must outlive the copy
        self._runtime.copy(destination, source, self._copies)
        self._copies.record_event(self._sent[self._turn])

    def close(self) -> None:
        for event, buffer, pinned in zip(self._sent, self._buffers, self._pinned, strict=True):
            event.synchronize()
            if pinned:
                self._runtime.unpin(buffer)
        self._buffers, self._pinned, self._sent = [], [], []
