"""This lands reads in host memory: in place where possible, through a staging buffer where not.

In place is possible if the tensor lies at the same spot within a page as in its file (direct reads demand that) and is
stored in the dtype it is wanted in.

It knows dtypes, blocks and pages. It refuses to know who reads, when all has landed, and which tensor it was.
"""

from __future__ import annotations

import numpy as np
import torch

from airstream.codecs.block_types import BlockType
from airstream.codecs.decode import STEP_ELEMENTS, decode_into
from airstream.reporting.probe import CONVERT, HOST_COPY, Probe
from airstream.reporting.units import round_up
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.piece import Cast, Piece

DEALT_BYTES = 1 << 20
"""The bytes of packed rows that are dealt out at a time."""


class Staging:
    """One staging buffer per reader thread, made when a thread first needs one. `probe` is told what leaves them."""

    def __init__(self, chunk_bytes: int, probe: Probe | None = None) -> None:
        self.probe = probe or Probe()
        self._nbytes = round_up(chunk_bytes + PAGE_BYTES, PAGE_BYTES)
        self._buffers: dict[int, HostBuffer] = {}

    def buffer(self, worker: int) -> HostBuffer:
        """The staging buffer of reader thread `worker`. Its first call allocates it."""
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
        """The memory itself if the piece can land in place, else the staging buffer of this reader thread."""
        if self._in_place(piece, direct):
            return self._view[piece.target : piece.target + piece.nbytes]
        return self._staging.buffer(worker).view[read_to(piece, direct)]

    def landed(self, worker: int, piece: Piece, direct: bool) -> None:
        """Copy or decode `piece` from the staging buffer to its place, unless it is there already."""
        if self._in_place(piece, direct):
            return
        raw = self._staging.buffer(worker).tensor[staged(piece)]
        with self._staging.probe.span(CONVERT if piece.cast else HOST_COPY, piece.nbytes):
            cast_into(self._memory[piece.target : piece.target + piece.target_bytes], raw, piece.cast)

    def _in_place(self, piece: Piece, direct: bool) -> bool:
        congruent = (self._address + piece.target - piece.offset) % PAGE_BYTES == 0
        return piece.cast is None and (congruent or not direct)


def staged(piece: Piece) -> slice:
    """Where `piece` lies in a staging buffer: at its place within a page, which direct reads want."""
    phase = piece.offset % PAGE_BYTES
    return slice(phase, phase + piece.nbytes)


def read_to(piece: Piece, direct: bool) -> slice:
    """What of a staging buffer `piece` is read to: if `direct`, all pages that it touches, by one read."""
    place = staged(piece)
    return slice(0, round_up(place.stop, PAGE_BYTES)) if direct else place


def cast_into(target: torch.Tensor, raw: torch.Tensor, cast: Cast | None) -> None:
    """Copy the bytes `raw` to the bytes `target`, item by item through `cast` if there is one."""
    if cast is None:
        _copy(target, raw)
    elif cast.ways > 1:
        _deal_into(target, raw, cast)
    else:
        _numbers_into(target, raw, cast)


def _deal_into(target: torch.Tensor, raw: torch.Tensor, cast: Cast) -> None:
    """Deals rows out while they are packed, when they are smallest; some items at a time, so that memory is little."""
    num_items, step = raw.numel() // cast.source_item_bytes, max(1, DEALT_BYTES // cast.source_item_bytes)
    for first in range(0, num_items, step):
        items = raw[first * cast.source_item_bytes : (first + step) * cast.source_item_bytes]
        numbers = target[first * cast.target_item_bytes : (first + step) * cast.target_item_bytes]
        rows = items.view(-1, cast.rows // cast.ways, cast.ways, cast.source_item_bytes // cast.rows)
        dealt = torch.empty_like(items)
        _copy(dealt.view(-1, cast.ways, *rows.shape[1::2]), rows.transpose(1, 2))
        _numbers_into(numbers, dealt, cast)


def _numbers_into(target: torch.Tensor, raw: torch.Tensor, cast: Cast) -> None:
    numbers = target.view(getattr(torch, cast.target))
    if isinstance(cast.source, BlockType):
        decode_into(numbers, raw, cast.source)
        return
    source = getattr(torch, cast.source)
    if raw.storage_offset() % source.itemsize:
        raw = raw.clone()  # a view of another dtype must start on an element
    items = raw.view(source)
    step = STEP_ELEMENTS if raw.device.type == "cpu" else items.numel()
    for first in range(0, items.numel(), step):
        numbers[first : first + step].copy_(items[first : first + step])


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes. On a CPU the thread that asks does it alone: torch would wake others, of which there are enough."""
    if source.device.type == "cpu" == target.device.type:
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)
