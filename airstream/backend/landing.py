"""Reads that land in host memory: in place where possible, through a staging buffer where not.

In place is possible if the tensor lies at the same spot within a page as in its file (direct reads demand that) and is
stored in the dtype it is wanted in.
"""

from __future__ import annotations

import torch

from airstream.backend.host_memory import HostBuffer
from airstream.checkpoint.files import PAGE_BYTES
from airstream.checkpoint.reader import Cast, Piece
from airstream.codecs import BLOCK_TYPES, decode_into
from airstream.probe import CONVERT, HOST_COPY, Probe


class Staging:
    """One staging buffer per reader thread, made when a thread first needs one. `probe` is told what leaves them."""

    def __init__(self, chunk_bytes: int, probe: Probe | None = None) -> None:
        self.probe = probe or Probe()
        self._nbytes = chunk_bytes + PAGE_BYTES
        self._buffers: dict[int, HostBuffer] = {}

    def buffer(self, worker: int) -> HostBuffer:
        if worker not in self._buffers:
            self._buffers[worker] = HostBuffer(self._nbytes)
        return self._buffers[worker]


class HostLanding:
    """Lands pieces in `memory`, a uint8 host tensor; `piece.target` counts from its start."""

    def __init__(self, memory: torch.Tensor, staging: Staging) -> None:
        self._memory = memory
        self._view = memoryview(memory.numpy().data)
        self._staging = staging
        self._address = memory.data_ptr()

    def window(self, worker: int, piece: Piece, direct: bool) -> memoryview:
        if self._in_place(piece, direct):
            return self._view[piece.target : piece.target + piece.nbytes]
        phase = piece.offset % PAGE_BYTES
        return self._staging.buffer(worker).view[phase : phase + piece.nbytes]

    def landed(self, worker: int, piece: Piece, direct: bool) -> None:
        if self._in_place(piece, direct):
            return
        phase = piece.offset % PAGE_BYTES
        raw = self._staging.buffer(worker).tensor[phase : phase + piece.nbytes]
        with self._staging.probe.span(CONVERT if piece.cast else HOST_COPY, piece.nbytes):
            cast_into(self._memory[piece.target : piece.target + piece.target_bytes], raw, piece.cast)

    def _in_place(self, piece: Piece, direct: bool) -> bool:
        congruent = (self._address + piece.target - piece.offset) % PAGE_BYTES == 0
        return piece.cast is None and (congruent or not direct)


def cast_into(target: torch.Tensor, raw: torch.Tensor, cast: Cast | None) -> None:
    """Copy the bytes `raw` to the bytes `target`, item by item through `cast` if there is one."""
    if cast is None:
        target.copy_(raw)
        return
    if cast.ways > 1:
        _deal_into(target, raw, cast)
    else:
        _numbers_into(target, raw, cast)


def _deal_into(target: torch.Tensor, raw: torch.Tensor, cast: Cast) -> None:
    """An item at a time, so that memory is needed for one."""
    item = torch.empty(cast.target_item_bytes, dtype=torch.uint8, device=target.device)
    dtype = getattr(torch, cast.target)
    dealt = item.view(dtype).view(cast.rows // cast.ways, cast.ways, -1).transpose(0, 1)
    runs = target.view(dtype).view(-1, *dealt.shape)
    for number, packed in enumerate(raw.view(-1, cast.source_item_bytes)):
        _numbers_into(item, packed, cast)
        runs[number].copy_(dealt)


def _numbers_into(target: torch.Tensor, raw: torch.Tensor, cast: Cast) -> None:
    if cast.is_blocks:
        decode_into(target.view(getattr(torch, cast.target)), raw, BLOCK_TYPES[cast.source])
        return
    source = getattr(torch, cast.source)
    if raw.storage_offset() % source.itemsize:
        raw = raw.clone()  # a view of another dtype must start on an element
    target.view(getattr(torch, cast.target)).copy_(raw.view(source))
