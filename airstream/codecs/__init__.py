"""Packed weights: what a block of a type is, and how blocks become numbers. `BLOCK_TYPES` has every type by name.

Knows bytes and tensors, on any device. Refuses to know files, models, or who needs the numbers when.
"""

from airstream.codecs.registry import (
    BLOCK_TYPES,
    DECODE_SCRATCH_BYTES,
    DEVICE_SLICE_ELEMENTS,
    HOST_SCRATCH_BYTES,
    STEP_ELEMENTS,
    BlockType,
    decode_into,
    decoding_seconds,
)

__all__ = [
    "BLOCK_TYPES",
    "DECODE_SCRATCH_BYTES",
    "DEVICE_SLICE_ELEMENTS",
    "HOST_SCRATCH_BYTES",
    "STEP_ELEMENTS",
    "BlockType",
    "decode_into",
    "decoding_seconds",
]
