"""Blocks are unpacked where their numbers go, to the bits that every other way of decoding gives."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airstream.codecs import team
from airstream.codecs.block_types import BLOCK_TYPES, GRID_TYPES, BlockType
from airstream.codecs.decode import decode_into
from airstream.codecs.in_place import may_unpack, unpack_in_place
from airstream.codecs.library import has_kernels
from airstream.codecs.lossless_pack import choose_block, encode
from airstream.errors import CheckpointError

pytestmark = pytest.mark.skipif(not has_kernels(), reason="no kernels were compiled")

IN_TWO_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
LARGE = 3 << 20
"""Numbers that are written past the caches, and shared among threads."""


@pytest.fixture(params=["one thread", "threads of torch", "threads of its own"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "threads of its own":
        monkeypatch.setattr(team, "torch_threads", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else 3)
    yield
    torch.set_num_threads(before)


def some_blocks(block: BlockType, count: int) -> torch.Tensor:
    """Any bytes, but for scales, which may be anything that is a number."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 60, (count * block.nbytes,), dtype=torch.uint8, generator=generator)


def lossless(count: int, name: str) -> tuple[BlockType, torch.Tensor, torch.Tensor]:
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(1)).bfloat16()
    numbers[::997] *= 1e-20  # exponents that have no code
    block = choose_block(numbers, 2048, (name,))
    assert block is not None
    return block, encode(numbers, block).view(-1), numbers


def in_place(raw: torch.Tensor, block: BlockType, dtype: torch.dtype, beyond: int = 0) -> torch.Tensor:
    nbytes = raw.numel() // block.nbytes * block.elements * dtype.itemsize
    memory = torch.full((nbytes + beyond,), 0x5A, dtype=torch.uint8)
    packed = memory[nbytes + beyond - raw.numel() :].copy_(raw)
    numbers = memory[:nbytes].view(dtype)
    unpack_in_place(numbers, packed, block)
    return numbers


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if not name.startswith("TQ")])
@IN_TWO_DTYPES
def test_every_type_has_the_bits_that_decoding_gives(name: str, dtype: torch.dtype) -> None:
    block = BLOCK_TYPES[name]
    if name.startswith(GRID_TYPES) and importlib.util.find_spec("gguf") is None:
        pytest.skip("its tables are in package gguf")
    for count in (1, 2, 3, 7, 250, 4099):
        raw = some_blocks(block, count)
        expected = torch.empty(count * block.elements, dtype=dtype)
        decode_into(expected, raw, block)
        assert torch.equal(in_place(raw, block, dtype).view(torch.int16), expected.view(torch.int16))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), beyond=st.integers(0, 5000), name=st.sampled_from(["Q4_0", "Q8_0", "Q6_K", "MXFP4"]))
def test_packed_bytes_may_reach_beyond_their_numbers(count: int, beyond: int, name: str) -> None:
    block = BLOCK_TYPES[name]
    raw = some_blocks(block, count)
    expected = torch.empty(count * block.elements, dtype=torch.bfloat16)
    decode_into(expected, raw, block)
    assert torch.equal(in_place(raw, block, torch.bfloat16, beyond).view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("name", ["bf16x12", "bf16x11"])
@pytest.mark.parametrize("beyond", [0, 4095])
def test_large_weights_come_back_bit_for_bit(threads: None, name: str, beyond: int) -> None:
    block, raw, numbers = lossless(LARGE, name)
    assert torch.equal(in_place(raw, block, torch.bfloat16, beyond).view(torch.int16), numbers.view(torch.int16))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
@IN_TWO_DTYPES
def test_large_weights_of_small_blocks(threads: None, name: str, dtype: torch.dtype) -> None:
    block = BLOCK_TYPES[name]
    raw = some_blocks(block, LARGE // block.elements + 1)
    expected = torch.empty(raw.numel() // block.nbytes * block.elements, dtype=dtype)
    decode_into(expected, raw, block)
    assert torch.equal(in_place(raw, block, dtype).view(torch.int16), expected.view(torch.int16))


def test_packed_bytes_elsewhere_stay_as_they_are(threads: None) -> None:
    block, raw, numbers = lossless(LARGE, "bf16x12")
    before, out = raw.clone(), torch.empty_like(numbers)
    unpack_in_place(out, raw, block)
    assert torch.equal(out.view(torch.int16), numbers.view(torch.int16))
    assert torch.equal(raw, before)


@pytest.mark.parametrize("at", [0, 1000, LARGE // 2048 - 2, LARGE // 2048 - 1])
def test_a_damaged_block_is_named(threads: None, at: int) -> None:
    block, raw, _ = lossless(LARGE, "bf16x12")
    places = at * block.nbytes + 8 + block.elements + block.elements // 2
    raw[places : places + 2] = 0xFF  # where the first number without a code is said to be
    with pytest.raises(CheckpointError, match=f"block {at:,} of bf16x12 is damaged"):
        in_place(raw, block, torch.bfloat16)


def test_numbers_are_never_written_over_what_is_not_read() -> None:
    block = BLOCK_TYPES["Q8_0"]
    memory = torch.zeros(1000 * 64, dtype=torch.uint8)
    for packed in (memory[: 1000 * 34], memory[-1000 * 34 - 1 : -1]):
        with pytest.raises(ValueError, match="end before their numbers"):
            unpack_in_place(memory.view(torch.bfloat16), packed, block)


def test_sizes_that_do_not_go_together_are_refused() -> None:
    block = BLOCK_TYPES["Q8_0"]
    for packed, numbers in ((33, 32), (34, 31), (68, 32)):
        with pytest.raises(ValueError, match="do not make"):
            unpack_in_place(torch.empty(numbers), torch.empty(packed, dtype=torch.uint8), block)
    with pytest.raises(ValueError, match="no kernel"):
        unpack_in_place(torch.empty(32, dtype=torch.float16), torch.empty(34, dtype=torch.uint8), block)


@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        (BlockType("nothing", 32, 18), torch.bfloat16),
        (BLOCK_TYPES["TQ1_0"], torch.bfloat16),
        (BLOCK_TYPES["Q8_0"], torch.float16),
        (BlockType("bf16x12", 32, 68, "bfloat16"), torch.float32),
        (BlockType("bf16x12", 32, 68, "bfloat16"), torch.bfloat16),  # larger than what it is packed of
    ],
)
def test_what_no_kernel_makes_smaller_is_not_for_it(block: BlockType, dtype: torch.dtype) -> None:
    assert not may_unpack(block, dtype)
