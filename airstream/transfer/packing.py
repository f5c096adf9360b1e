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
    """

    follows_file: bool
    alignment: int


HOST_PACKING = Packing(follows_file=True, alignment=0)
"""Of host memory that reads land in."""

DEVICE_PACKING = Packing(follows_file=False, alignment=256)
"""Of memory that bytes are copied to. Device allocators give multiples of 256 bytes, and matrix kernels ask about them
when they choose an algorithm."""


def packing_of(device: torch.device) -> Packing:
    """How slabs for `device` are packed; known before anything is allocated there."""
    return HOST_PACKING if device.type == "cpu" else DEVICE_PACKING
