"""Blocks become exactly the numbers that the format's reference makes of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from airstream.codecs.block_types import BLOCK_TYPES, HOST_ONLY, BlockType
from airstream.codecs.decode import (
    DECODE_SCRATCH_BYTES,
    DEVICE_SLICE_ELEMENTS,
    STEP_ELEMENTS,
    decode_into,
    decode_with_torch,
)
from airstream.codecs.native import kernel
from airstream.codecs.traffic import decoding_traffic
from tests.stand_ins.sim import SimDevice

EVERY_WAY = pytest.mark.parametrize("decode", [decode_into, decode_with_torch], ids=["compiled", "torch"])
"""Where there is no kernel, both are the same."""
EVERY_TYPE = pytest.mark.parametrize("block", BLOCK_TYPES.values(), ids=lambda block: block.name)


Decode = Callable[[torch.Tensor, torch.Tensor, BlockType], None]


@dataclass(frozen=True)
class Reference:
    """A block type as another implementation has it: blocks (n, nbytes) in uint8 become numbers in float32."""

    elements: int
    nbytes: int
    dequantize: Callable[[Any], Any]


def in_gguf(kind: GGMLQuantizationType) -> Reference:
    return Reference(*GGML_QUANT_SIZES[kind], partial(dequantize, qtype=kind))


REFERENCES: Mapping[str, Reference] = {kind.name: in_gguf(kind) for kind in GGML_QUANT_SIZES}
"""By the names of block types. A type that GGUF does not have gets a row of its own."""

WITHOUT_KERNEL = {"TQ1_0", "TQ2_0"}
"""Types that torch decodes everywhere."""


def test_every_type_has_a_reference() -> None:
    assert not BLOCK_TYPES.keys() - REFERENCES.keys(), "add a row to REFERENCES"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_there_are_kernels_where_there_is_a_compiler() -> None:
    """Of all types but a few; else the tests of kernels would test torch twice."""
    assert {name for name in BLOCK_TYPES if kernel(name) is None} == WITHOUT_KERNEL


def reference(raw: torch.Tensor, block: BlockType) -> torch.Tensor:
    with np.errstate(all="ignore"):
        numbers = REFERENCES[block.name].dequantize(raw.view(-1, block.nbytes).numpy())
    return torch.from_numpy(numbers.reshape(-1).copy())


def random_blocks(block: BlockType, count: int, seed: int) -> torch.Tensor:
    """Any bytes at all: scales that are not a number, infinite, subnormal or negative zero are among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count * block.nbytes,), dtype=torch.uint8, generator=generator)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal to the sign of zero; where one is not a number, neither is the other."""
    numbers = ~theirs.isnan()
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[theirs.dtype]
    same_nan = torch.equal(ours.isnan(), ~numbers)
    return same_nan and torch.equal(ours.view(bits)[numbers], theirs.view(bits)[numbers])


@EVERY_TYPE
def test_sizes_are_those_of_the_format(block: BlockType) -> None:
    theirs = REFERENCES[block.name]
    assert (block.elements, block.nbytes) == (theirs.elements, theirs.nbytes)


@EVERY_WAY
@EVERY_TYPE
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 300))
def test_any_bytes_decode_as_the_reference(block: BlockType, decode: Decode, seed: int, count: int) -> None:
    raw = random_blocks(block, count, seed)
    theirs = reference(raw, block)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = torch.full((count * block.elements,), 7, dtype=dtype)
        decode(ours, raw, block)
        assert same_bits(ours, theirs.to(dtype)), dtype


@EVERY_WAY
@EVERY_TYPE
def test_blocks_may_lie_anywhere(block: BlockType, decode: Decode) -> None:
    raw = random_blocks(block, 8, seed=1)
    odd = torch.cat((torch.zeros(3, dtype=torch.uint8), raw))[3:]
    ours = torch.empty(8 * block.elements)
    decode(ours, odd, block)
    assert same_bits(ours, reference(raw, block))


@pytest.mark.parametrize(("nbytes", "elements"), [(2 * 18, 32), (18, 64), (17, 32), (19, 32)])
def test_no_number_is_written_beside_the_target(nbytes: int, elements: int) -> None:
    with pytest.raises(ValueError, match=f"{nbytes} bytes of Q4_0 do not make {elements} numbers"):
        decode_into(torch.empty(elements), torch.zeros(nbytes, dtype=torch.uint8), BLOCK_TYPES["Q4_0"])


@EVERY_WAY
@pytest.mark.parametrize("value", [0x7C00, 0xFC00, 0x7E00, 0x8000, 0x0001, 0x83FF, 0x7BFF], ids=hex)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_special_scales(name: str, value: int, decode: Decode) -> None:
    """Every pair of neighbouring bytes is the special half-precision number in some block."""
    block = BLOCK_TYPES[name]
    raw = random_blocks(block, block.nbytes // 2, seed=2).view(-1, block.nbytes)
    for number, one in enumerate(raw):
        one[2 * number : 2 * number + 2] = torch.tensor([value & 255, value >> 8], dtype=torch.uint8)
    ours = torch.empty(len(raw) * block.elements)
    decode(ours, raw.view(-1), block)
    assert same_bits(ours, reference(raw.view(-1), block))


@EVERY_TYPE
def test_memory_for_decoding_on_a_device_is_planned(block: BlockType, sim: SimDevice) -> None:
    """More than one slice, so that what one leaves behind would count with the next."""
    count = (DEVICE_SLICE_ELEMENTS + STEP_ELEMENTS) // block.elements
    raw = random_blocks(block, count, seed=3).to(sim.device)
    target = torch.empty(count * block.elements, dtype=torch.bfloat16, device=sim.device)
    sim.peak_bytes = before = sim.allocated_bytes
    decode_into(target, raw, block)
    assert sim.peak_bytes - before <= DECODE_SCRATCH_BYTES
    assert sim.allocated_bytes == before


@EVERY_TYPE
def test_it_is_known_which_types_a_device_decodes(block: BlockType) -> None:
    """A device without bytes has torch's operations, and none that would take the bytes to the CPU."""
    raw = torch.empty(3 * block.nbytes, dtype=torch.uint8, device="meta")
    target = torch.empty(3 * block.elements, device="meta")
    if block.name not in HOST_ONLY:
        decode_with_torch(target, raw, block)
        return
    with pytest.raises(NotImplementedError, match="meta tensor"):
        decode_with_torch(target, raw, block)


@pytest.mark.parametrize(
    ("name", "dtype", "nbytes"),
    [
        # Of Q8_0: a byte is read and a float32 written, that one read and written again for the scale, and, if another
        # dtype is wanted, read and written as that. The scale, for 32 numbers: a half is read, a float32 written, read.
        ("Q8_0", torch.float32, (1 + 4) + (4 + 4) + (2 + 4 + 4) / 32),
        ("Q8_0", torch.bfloat16, (1 + 4) + (4 + 4) + (4 + 2) + (2 + 4 + 4) / 32),
        ("IQ1_S", torch.float32, 0.0),
    ],
)
def test_the_memory_that_decoding_passes_over(name: str, dtype: torch.dtype, nbytes: float) -> None:
    assert decoding_traffic(BLOCK_TYPES[name], dtype) == pytest.approx(nbytes)


@EVERY_TYPE
def test_no_device_decodes_without_reading_and_writing(block: BlockType) -> None:
    least = block.nbytes / block.elements + 2
    assert decoding_traffic(block, torch.bfloat16) >= least or block.name in HOST_ONLY
