"""This says what memory bytes take on their way, before any of it is allocated.

It knows buffers for reads, and what decoding takes. It refuses to know what is moved.
"""

from __future__ import annotations

import torch

from airstream.codecs.decode import DECODE_SCRATCH_BYTES, HOST_SCRATCH_BYTES
from airstream.transfer.files import PAGE_BYTES

BUFFERS_PER_WORKER = 2
"""Pinned buffers of each reader thread of an accelerator: while one is copied, the other one is filled."""

SCRATCHES = 2
"""Where packed bytes arrive on an accelerator: while one is decoded, the other one is copied to."""


def decoding_bytes(device: torch.device, num_workers: int, chunk_bytes: int) -> int:
    """Bytes of the memory that computes for packed weights on their way: where they arrive, and to decode them."""
    if device.type == "cpu":
        return num_workers * HOST_SCRATCH_BYTES
    return SCRATCHES * (chunk_bytes + PAGE_BYTES) + DECODE_SCRATCH_BYTES


def staging_bytes(device: torch.device, num_workers: int, chunk_bytes: int) -> int:
    """Host bytes that the staging buffers of `num_workers` reader threads take, once reads go through them."""
    # On an accelerator one more: what is cast on its way into hosted weights passes through it.
    buffers = 1 if device.type == "cpu" else BUFFERS_PER_WORKER + 1
    return num_workers * buffers * (chunk_bytes + PAGE_BYTES)
