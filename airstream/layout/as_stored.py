"""Tensors that wait in host memory for a device lie there as they lie in their file, if they are packed there.

So they take the memory and the bus no more bytes than the disk: the device decodes them in every pass.

It knows pieces and slabs. It refuses to know who copies, and by which way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from airstream.layout.slab import Slab, pack, stored_specs
from airstream.layout.tensors import TensorSpec
from airstream.transfer.crossing import Crossing
from airstream.transfer.packing import HOST_PACKING
from airstream.transfer.piece import Piece

Crossings = Mapping[str, tuple[Crossing, ...]]
"""By the name of each tensor, what goes from a slab to the device; targets count from the tensor's first byte."""


def pack_as_stored(specs: Iterable[TensorSpec]) -> tuple[Slab, Crossings]:
    """Lay out what is read for `specs` in host memory. Reads of blocks land in place, as those without a cast do.

    Returns:
        The slab, whose specs are parts of tensors, and what crosses from it.
    """
    parts = {spec.name: tuple(_parts(spec)) for spec in stored_specs(specs)}
    slab = pack((part for each in parts.values() for part, _ in each), HOST_PACKING)
    return slab, {
        name: tuple(replace(crossing, source=slab.offsets[part.name]) for part, crossing in each)
        for name, each in parts.items()
    }


def _parts(spec: TensorSpec) -> Iterator[tuple[TensorSpec, Crossing]]:
    """`spec` in parts that may lie anywhere, and how each of them crosses, as if all lay at byte 0."""
    if not any(_is_packed(piece) for piece in spec.pieces):
        yield spec, Crossing(0, spec.nbytes, 0)
        return
    for number, piece in enumerate(spec.pieces):
        name, whole = f"{spec.name}#{number}", replace(piece, target=0)
        if _is_packed(piece):
            part = TensorSpec(name, torch.uint8, (piece.nbytes,), (replace(whole, cast=None),))
            yield part, Crossing(0, piece.nbytes, piece.target, piece.cast)
        else:
            part = TensorSpec(name, spec.dtype, (piece.target_bytes // spec.dtype.itemsize,), (whole,))
            yield part, Crossing(0, piece.target_bytes, piece.target)


def _is_packed(piece: Piece) -> bool:
    """Whether it waits as it is stored. So do blocks that a device can decode, be their rows dealt out or not.

    All else waits as it computes: blocks that the CPU would have to decode in every pass, and numbers of another dtype,
    which may be wider in the file.
    """
    return piece.cast is not None and piece.cast.is_for_devices
