"""A slab is one run of bytes in which tensors lie side by side, so that few large reads fill it.

It knows byte plans and what a backend wants of addresses. Nothing here is allocated or read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from airstream.layout.tensors import CACHE_LINE_BYTES, RAW_PREFIX, Conversion, TensorSpec
from airstream.reporting.units import round_up
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.packing import Packing
from airstream.transfer.piece import Piece
from airstream.transfer.unpacking import Unpacking, as_stored

MAX_GAP_BYTES = 1 << 20
"""Bytes nobody needs that are read along when they lie between two tensors of a slab: cheaper than a second read."""

KERNEL_SHARE = 1 / 16
"""Of what it makes: a kernel of ours takes no more memory, for scales. Libraries take several times as much as that."""


@dataclass(frozen=True, slots=True)
class Slab:
    """Tensors that travel together: one run of `nbytes` bytes, the reads that fill it, and where each tensor starts.

    `unpackings` come after the reads, and then `conversions`.
    """

    nbytes: int
    pieces: tuple[Piece, ...]
    offsets: Mapping[str, int]
    specs: tuple[TensorSpec, ...]
    unpackings: tuple[Unpacking, ...] = ()
    conversions: tuple[Conversion, ...] = ()

    @property
    def read_bytes(self) -> int:
        """Bytes that leave the disk to fill the slab."""
        return sum(piece.nbytes for piece in self.pieces)


def distinct(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """`specs` without those that are made of the same bytes as another one."""
    return list({spec.identity: spec for spec in specs}.values())


def stored_specs(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """What is read for `specs`: themselves, or the raw tensors that they are made of."""
    return list({stored.name: stored for spec in specs for stored in spec.stored}.values())


def is_made_in_passes(spec: TensorSpec, packing: Packing) -> bool:
    """Whether `spec` is made dense in every pass where it stays packed.

    On a CPU only by what takes next to no memory for that, which are kernels of ours: others take longer than a disk.
    """
    made_by = spec.made_by
    if made_by is None:
        return bool(packed_parts(spec, packing))
    if made_by.is_object:
        return False
    return not packing.follows_file or made_by.scratch_bytes <= KERNEL_SHARE * spec.nbytes


def packed_parts(spec: TensorSpec, packing: Packing) -> tuple[TensorSpec, ...]:
    """The pieces of `spec` as tensors of bytes, if all of them can be unpacked by whoever computes."""
    stored = [as_stored(piece) if packing.unpacks_there else None for piece in spec.pieces]
    names = (f"{RAW_PREFIX}{spec.name}#{number}" for number in range(len(stored)))
    parts = [
        TensorSpec(name, torch.uint8, (piece.nbytes,), (replace(piece, target=0),))
        for name, piece in zip(names, stored, strict=True)
        if piece is not None
    ]
    return tuple(parts) if len(parts) == len(stored) else ()


def _written_over(spec: TensorSpec, packing: Packing) -> tuple[TensorSpec, ...]:
    """What of the sources of `spec` may lie at the end of its place: what it is made of, row by row, by a kernel."""
    made_by = spec.made_by
    if (
        made_by is None
        or made_by.name != spec.name
        or not packing.unpacks_there
        or not is_made_in_passes(spec, packing)
    ):
        return ()
    largest = max(made_by.sources, key=lambda raw: raw.nbytes)
    is_plain = len(largest.pieces) == 1 and largest.pieces[0].cast is None and largest.nbytes < spec.nbytes
    others = made_by.nbytes - largest.nbytes
    return (largest,) if is_plain and others <= KERNEL_SHARE * spec.nbytes else ()


def _made_of(spec: TensorSpec, packing: Packing) -> tuple[TensorSpec, ...]:
    return spec.stored if spec.made_by is not None else packed_parts(spec, packing)


def kept_specs(specs: Iterable[TensorSpec], packing: Packing) -> list[TensorSpec]:
    """What stays in memory of `specs` that stay packed: the raw ones, where passes make the others of them."""
    kept = (_made_of(spec, packing) if is_made_in_passes(spec, packing) else (spec,) for spec in specs)
    return list({spec.name: spec for each in kept for spec in each}.values())


def pack(
    specs: Iterable[TensorSpec], packing: Packing, elsewhere: Collection[str] = (), beside: Set[str] = frozenset()
) -> Slab:
    """Lay `specs` out in one slab, neighbours in a file side by side, so that few large reads fill it.

    Args:
        elsewhere: the names of those, raw ones too, that have room in it, but come from elsewhere, and are not read.
        beside: the names of raw ones that are not in it: others are made of them where they are.
    """
    specs = tuple(specs)
    conversions = tuple(dict.fromkeys(spec.made_by for spec in specs if spec.made_by is not None))
    parts = {spec.name: packed_parts(spec, packing) for spec in specs if beside and spec.made_by is None}
    unpacked = {name: each for name, each in parts.items() if each and {part.name for part in each} <= beside}
    stored = [spec for spec in stored_specs(specs) if spec.name not in beside and spec.name not in unpacked]
    made = [spec for spec in specs if spec.made_by is not None and not spec.made_by.is_object]
    under = {raw.name: spec for spec in made for raw in _written_over(spec, packing) if raw in stored}
    builder = _SlabBuilder(packing)
    for spec in in_file_order(spec for spec in stored if spec.name not in elsewhere and spec.name not in under):
        builder.add(spec)
    for spec in in_file_order(spec for spec in stored if spec.name in under):
        builder.land_in(under[spec.name], spec)
    placed = {spec.name for spec in under.values()}
    whole = [spec for spec in made if spec.name not in placed]
    for spec in [*(spec for spec in stored if spec.name in elsewhere), *whole]:
        builder.reserve(spec)
    for spec in (spec for spec in specs if spec.name in unpacked):
        builder.unpack(spec, unpacked[spec.name])
    return Slab(
        nbytes=round_up(builder.end, PAGE_BYTES),
        pieces=tuple(builder.pieces),
        offsets=builder.offsets,
        specs=specs,
        unpackings=tuple(builder.unpackings),
        conversions=conversions,
    )


def in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """`specs`, all of which are read, in the order in which they lie in the checkpoint."""
    return sorted(specs, key=lambda spec: (spec.pieces[0].file, spec.pieces[0].offset))


class _SlabBuilder:
    """The slab so far: where it ends, and the read that the next tensor may be able to join."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.end = 0
        self.pieces: list[Piece] = []
        self.unpackings: list[Unpacking] = []
        self.offsets: dict[str, int] = {}

    def add(self, spec: TensorSpec) -> None:
        base = self._joined(spec)
        if base is None:
            base = self._fresh(spec)
        self.offsets[spec.name] = base
        self.end = max(self.end, base + spec.nbytes)
        room = PAGE_BYTES if len(spec.pieces) == 1 else 0  # behind one of several the next one begins
        for piece in spec.pieces:
            self._append(self._landing(replace(piece, target=base + piece.target), room))

    def _landing(self, piece: Piece, room: int) -> Piece:
        """What is read for `piece`."""
        landed = as_stored(piece, room) if self.packing.unpacks_there else None
        if landed is None:
            return piece
        self.unpackings.append(Unpacking(piece, landed.target))
        self.end = max(self.end, landed.target + landed.nbytes)
        return landed

    def reserve(self, spec: TensorSpec) -> None:
        """Room for a tensor that is not read: it is computed, or comes from elsewhere."""
        base = round_up(self.end, max(self.packing.alignment, CACHE_LINE_BYTES))
        if self.packing.follows_file:
            base += self._phase(spec) % CACHE_LINE_BYTES
        self.offsets[spec.name] = base
        self.end = base + spec.nbytes

    def land_in(self, spec: TensorSpec, raw: TensorSpec) -> None:
        """Room for `spec`, at the end of which `raw` lands, and a little behind, so that it is read in place there."""
        base = round_up(self.end, PAGE_BYTES) + self._phase(spec)  # it takes as much wherever that is
        self.offsets[spec.name] = base
        start, (piece,) = base + spec.nbytes - raw.nbytes, raw.pieces
        shift = (piece.offset - start) % PAGE_BYTES
        if (start + shift) % raw.dtype.itemsize:
            shift = -start % raw.dtype.itemsize
        self.offsets[raw.name] = start + shift
        self._append(replace(piece, target=start + shift))
        self.end = max(self.end, start + shift + raw.nbytes)

    def unpack(self, spec: TensorSpec, parts: Sequence[TensorSpec]) -> None:
        """Room for a tensor that is unpacked of `parts`, which lie elsewhere."""
        self.reserve(spec)
        for piece, part in zip(spec.pieces, parts, strict=True):
            placed = replace(piece, target=self.offsets[spec.name] + piece.target)
            self.unpackings.append(Unpacking(placed, kept=part.name))

    def _alignment(self, spec: TensorSpec) -> int:
        return self.packing.alignment or spec.dtype.itemsize

    def _joined(self, spec: TensorSpec) -> int | None:
        """Where `spec` lies if it continues the last read, gaps included; None if it cannot."""
        piece = spec.pieces[0]
        if not self.pieces or len(spec.pieces) > 1 or piece.cast is not None:
            return None
        last = self.pieces[-1]
        gap = piece.offset - (last.offset + last.nbytes)
        base = last.target + piece.offset - last.offset
        joins = last.cast is None and _is_same(last.file, piece.file) and 0 <= gap <= MAX_GAP_BYTES
        return base if joins and base >= self.end and self._may_start_at(base, spec) else None

    def _may_start_at(self, base: int, spec: TensorSpec) -> bool:
        if base % self._alignment(spec):
            return False
        return not self.packing.follows_file or base % CACHE_LINE_BYTES == self._phase(spec) % CACHE_LINE_BYTES

    def _phase(self, spec: TensorSpec) -> int:
        """Where within a page `spec` has to start.

        Within a cache line as in a resident model, which decides the last bit of what CPU kernels compute with it.
        Within that, reads land in place if the page is entered as in the file. Where no number may begin, as in files
        whose headers have an odd length, it starts with the page.
        """
        phase = self._wanted_phase(spec)
        return 0 if phase % self._alignment(spec) else phase

    def _wanted_phase(self, spec: TensorSpec) -> int:
        if not spec.pieces or spec.pieces[0].cast is not None:
            return spec.line_offset or 0
        piece = spec.pieces[0]
        in_file = (piece.offset - piece.target) % PAGE_BYTES
        if spec.line_offset is None or in_file % CACHE_LINE_BYTES == spec.line_offset:
            return in_file
        return spec.line_offset

    def _fresh(self, spec: TensorSpec) -> int:
        """Where `spec` lies if it starts a read of its own."""
        if not self.packing.follows_file:
            return round_up(self.end, max(self._alignment(spec), CACHE_LINE_BYTES))
        return round_up(self.end, PAGE_BYTES) + self._phase(spec)

    def _append(self, piece: Piece) -> None:
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.cast is None and piece.cast is None and _is_same(last.file, piece.file):
            gap = piece.offset - (last.offset + last.nbytes)
            if 0 <= gap <= MAX_GAP_BYTES and piece.target - last.target == piece.offset - last.offset:
                self.pieces[-1] = Piece(last.file, last.offset, piece.offset + piece.nbytes - last.offset, last.target)
                return
        self.pieces.append(piece)


def _is_same(one: Path, other: Path) -> bool:
    """Comparing paths takes long, and most are the same object."""
    return one is other or one == other
