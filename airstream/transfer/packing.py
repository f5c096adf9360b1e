"""A packing says how tensors must lie in a slab, so that reads land without a detour and kernels find them aligned.

It knows host memory and that of devices. It refuses to know tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Packing:
    """How tensors must lie in a slab.

    Attributes:
        follows_file: a tensor lies at the same place within a page as in its file, so that direct reads land in place.
        alignment: bytes; the start of every tensor is a multiple of it. 0 stands for the tensor's own element size.
        unpacks_there: blocks land as they are, at the end of the place of their numbers, and are unpacked by whoever
            computes with them.
    """

    follows_file: bool
    alignment: int
    unpacks_there: bool = False


HOST_PACKING = Packing(follows_file=True, alignment=0)
"""Of host memory that reads land in."""

CPU_PACKING = Packing(follows_file=True, alignment=0, unpacks_there=True)
"""Of host memory that a CPU computes from. Reader threads that unpacked would take its cores from who computes."""

DEVICE_PACKING = Packing(follows_file=False, alignment=256)
"""Of memory that bytes are copied to. Device allocators give multiples of 256 bytes, and matrix kernels ask about them
when they choose an algorithm."""


def packing_of(device: torch.device) -> Packing:
    """How slabs for `device` are packed; known before anything is allocated there."""
    return CPU_PACKING if device.type == "cpu" else DEVICE_PACKING
