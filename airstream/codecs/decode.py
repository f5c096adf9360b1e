"""This decodes any number of blocks with little memory, by the table of what takes each type apart.

It knows how much is decoded at a time, and what memory that takes. It refuses to know where blocks come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from airstream.codecs.block_types import BlockType
from airstream.codecs.grids import by_gguf
from airstream.codecs.lossless import decode_lossless
from airstream.codecs.lossless_blocks import LOSSLESS
from airstream.codecs.native import DTYPES, kernel
from airstream.codecs.simple import iq4_nl, mxfp4, q4_0, q4_1, q5_0, q5_1, q8_0
from airstream.codecs.super_blocks import iq4_xs, q2_k, q3_k, q4_k, q5_k, q6_k
from airstream.codecs.words import Unpacked

STEP_ELEMENTS = 32768 - 256
"""Numbers that a CPU computes at a time: they stay in the cache, and torch, which splits work on 32,768 numbers or more
among threads, leaves it to the thread that asks. There are several of those already."""

HOST_SLICE_ELEMENTS = 4 * STEP_ELEMENTS
"""Numbers that are taken apart at a time on a CPU: integers are few words, and so many of them repay the call."""

DEVICE_SLICE_ELEMENTS = 4 << 20
"""Numbers that are decoded at a time elsewhere: enough to keep a device busy, few enough to know the memory."""

DECODE_SCRATCH_BYTES = 8 * DEVICE_SLICE_ELEMENTS
"""Memory that decoding takes on a device for what lies between bytes and numbers: see tests/codecs/test_codecs.py."""

HOST_SCRATCH_BYTES = 8 * HOST_SLICE_ELEMENTS
"""Memory that decoding takes in each thread that decodes on a CPU."""

UNPACK: Mapping[str, Callable[[torch.Tensor], Unpacked]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "MXFP4": mxfp4,
    "IQ1_S": by_gguf("IQ1_S"),
    "IQ1_M": by_gguf("IQ1_M"),
    "IQ2_XXS": by_gguf("IQ2_XXS"),
    "IQ2_XS": by_gguf("IQ2_XS"),
    "IQ2_S": by_gguf("IQ2_S"),
    "IQ3_XXS": by_gguf("IQ3_XXS"),
    "IQ3_S": by_gguf("IQ3_S"),
    "TQ1_0": by_gguf("TQ1_0"),
    "TQ2_0": by_gguf("TQ2_0"),
}
"""Takes blocks (n, nbytes) in uint8 apart, by the name of their type."""


def decode_into(target: torch.Tensor, raw: torch.Tensor, block: BlockType) -> None:
    """Write the numbers of `raw`, uint8 of whole blocks, to `target`, flat, in its dtype, on the same device.

    They are computed in the dtype of `block` and rounded once. Does not block where torch does not.

    Raises:
        CheckpointError: a lossless block is damaged, on a CPU; the message has its number.
        ValueError: there are not as many numbers as `target` takes.
    """
    count = raw.numel() // block.nbytes
    if raw.numel() != count * block.nbytes or target.numel() != count * block.elements:  # C would not notice
        raise ValueError(f"{raw.numel()} bytes of {block.name} do not make {target.numel()} numbers")
    if block.name in LOSSLESS:
        decode_lossless(target, raw, block, _slice_elements(raw), native=True)
        return
    native = kernel(block.name) if raw.device.type == "cpu" and target.dtype in DTYPES else None
    if native is not None and raw.is_contiguous() and target.is_contiguous():
        native(raw.data_ptr(), target.data_ptr(), count, target.dtype == torch.bfloat16)
    else:
        decode_with_torch(target, raw, block)


def decode_with_torch(target: torch.Tensor, raw: torch.Tensor, block: BlockType) -> None:
    """As `decode_into`, on any device."""
    if block.name in LOSSLESS:
        decode_lossless(target, raw, block, _slice_elements(raw), native=False)
        return
    if raw.storage_offset() % 2:
        raw = raw.clone()  # scales are viewed as the halves they are
    on_host = raw.device.type == "cpu"
    blocks, numbers = raw.view(-1, block.nbytes), target.view(-1, block.elements)
    slice_blocks = _slice_elements(raw) // block.elements
    step_blocks = STEP_ELEMENTS // block.elements if on_host else slice_blocks
    for start in range(0, len(blocks), slice_blocks):
        unpacked = UNPACK[block.name](blocks[start : start + slice_blocks])
        for first in range(0, len(unpacked.numbers), step_blocks):
            step = slice(first, first + step_blocks)
            some, scale, shift = (None if part is None else part[step] for part in unpacked)
            assert some is not None
            _compute(numbers[start + first : start + first + len(some)], Unpacked(some, scale, shift))


def _slice_elements(raw: torch.Tensor) -> int:
    return HOST_SLICE_ELEMENTS if raw.device.type == "cpu" else DEVICE_SLICE_ELEMENTS


def _compute(target: torch.Tensor, unpacked: Unpacked) -> None:
    numbers, scale, shift = unpacked
    in_place = target.dtype == torch.float32
    result = (
        target.view(numbers.shape)
        if in_place
        else torch.empty(numbers.shape, dtype=torch.float32, device=numbers.device)
    )
    result.copy_(numbers)
    if scale is not None:
        result.mul_(scale)
    if shift is not None:
        result.add_(shift)
    if not in_place:
        target.copy_(result.view(target.shape))
