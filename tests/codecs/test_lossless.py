"""Every bit of a bfloat16 comes back from a lossless block, in every way of decoding, and damage is one clear error."""

from __future__ import annotations

import re
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airstream.codecs.block_types import BLOCK_TYPES, BlockType
from airstream.codecs.decode import (
    DECODE_SCRATCH_BYTES,
    DEVICE_SLICE_ELEMENTS,
    decode_into,
    decode_with_torch,
)
from airstream.codecs.in_place import may_unpack, unpack_in_place
from airstream.codecs.lossless import bad_blocks
from airstream.codecs.lossless_blocks import HEAD_BYTES, LOSSLESS, lossless_block, max_slots
from airstream.codecs.lossless_native import checksums, count_outside, decoder, encoder
from airstream.codecs.lossless_pack import Survey, choose_block, encode, encode_with_numpy
from airstream.errors import CheckpointError
from tests.stand_ins.sim import SimDevice

Decode = Callable[[torch.Tensor, torch.Tensor, BlockType], None]
Encode = Callable[[torch.Tensor, BlockType], torch.Tensor]


def decode_in_place(numbers: torch.Tensor, raw: torch.Tensor, block: BlockType) -> None:
    """By unpacking at the end of the memory that they fill; as it is done otherwise, where that is not for them."""
    if not may_unpack(block, numbers.dtype):
        decode_into(numbers, raw, block)
        return
    memory = torch.empty(numbers.nbytes, dtype=torch.uint8)
    packed = memory[numbers.nbytes - raw.numel() :].copy_(raw)
    unpack_in_place(memory.view(numbers.dtype), packed, block)
    numbers.copy_(memory.view(numbers.dtype))


EVERY_WAY = pytest.mark.parametrize(
    "decode", [decode_into, decode_with_torch, decode_in_place], ids=["compiled", "torch", "in place"]
)
BOTH_ENCODERS = pytest.mark.parametrize("pack", [encode, encode_with_numpy], ids=["compiled", "numpy"])
"""Where there is no kernel, both are the same."""
EVERY_CODEC = pytest.mark.parametrize("name", LOSSLESS)

FORMATS = Path(__file__).resolve().parents[2] / "docs" / "formats.md"


def bits(*numbers: int) -> torch.Tensor:
    """These 16 bits each, as bfloat16."""
    return torch.tensor([number - (number >> 15 << 16) for number in numbers], dtype=torch.int16).view(torch.bfloat16)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def block_of(name: str, elements: int, slots: int) -> BlockType:
    return lossless_block(name, elements, LOSSLESS[name].nbytes(elements, slots))


def reference(raw: bytes, block: BlockType) -> list[int]:
    """The bits of the numbers of one block, one after the other, as docs/formats.md says."""
    n, base = block.elements, raw[0]
    rest, codes = raw[8 : 8 + n], raw[8 + n :]
    if block.name == "bf16x12":
        shared = [(16 * (j // 32) + j % 16, 4 * (j % 32 // 16)) for j in range(n)]
        code = [codes[byte] >> shift & 15 for byte, shift in shared]
        exponents = [(base + c - 1) & 255 if c else 0 for c in code]
        slots = (block.nbytes - 8 - n - n // 2) // 3
        patches = codes[n // 2 :]
        for slot in range(slots):
            exponents[int.from_bytes(patches[2 * slot : 2 * slot + 2], "little")] = patches[2 * slots + slot]
    else:
        planes = [codes[p * n // 8 : (p + 1) * n // 8] for p in range(3)]
        code = [sum((planes[p][j // 8] >> j % 8 & 1) << p for p in range(3)) for j in range(n)]
        listed = iter(codes[3 * n // 8 :])
        exponents = [0 if c == 0 else next(listed) if c == 7 else (base + c - 1) & 255 for c in code]
    return [(r & 128) << 8 | e << 7 | r & 127 for r, e in zip(rest, exponents, strict=True)]


def referred(raw: torch.Tensor, block: BlockType) -> torch.Tensor:
    return torch.cat([bits(*reference(bytes(one.tolist()), block)) for one in raw.view(-1, block.nbytes)])


def decoded(decode: Decode, raw: torch.Tensor, block: BlockType, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    numbers = torch.full((raw.numel() // block.nbytes * block.elements,), 7, dtype=dtype)
    decode(numbers, raw, block)
    return numbers


def gaussian(count: int, seed: int, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul_(scale).bfloat16()


GOLDEN_NUMBERS = [0x3F80, 0xC020, 0x0000, 0x8000, 0x0001, 0x7F80, 0xFFC1, 0x3B80, 0x0080, *[0x3F00] * 23]
"""1, -2.5, zeros, the least subnormal, infinity, a NaN with a payload, 2 ** -8, the least normal, and halves."""


def golden() -> dict[str, bytes]:
    """The blocks that docs/formats.md shows."""
    found = re.findall(r"^# (bf16x\d+)\n((?:[0-9a-f ]+\n)+)", FORMATS.read_text(), re.MULTILINE)
    return {name: bytes.fromhex(text) for name, text in found}


@EVERY_CODEC
@BOTH_ENCODERS
def test_golden_blocks(name: str, pack: Encode) -> None:
    count = LOSSLESS[name].multiple
    numbers = bits(*(GOLDEN_NUMBERS + [0x3F00] * 32)[:count])
    block = block_of(name, count, 4)
    assert bytes(pack(numbers, block).tolist()) == golden()[name]
    assert golden()[name][4:8] == struct.pack("<I", zlib.crc32(numbers.view(torch.uint8).numpy()))


@EVERY_CODEC
@EVERY_WAY
def test_golden_blocks_decode(name: str, decode: Decode) -> None:
    raw = golden()[name]
    block = block_of(name, LOSSLESS[name].multiple, 4)
    numbers = bits(*(GOLDEN_NUMBERS + [0x3F00] * 32)[: block.elements])
    assert same_bits(decoded(decode, torch.frombuffer(bytearray(raw), dtype=torch.uint8), block), numbers)
    assert reference(raw, block) == [number & 0xFFFF for number in numbers.view(torch.int16).tolist()]


SPECIAL = [0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0x7F80, 0xFF80, 0x7F81, 0xFFC1, 0x7FFF, 0xFFFF, 0x3F80]


@EVERY_CODEC
@EVERY_WAY
@BOTH_ENCODERS
@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 24),
    count=st.integers(1, 40),
    scale=st.sampled_from([1e-40, 1e-3, 0.02, 1.0, 1e30]),
    special=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 0xFFFF) | st.sampled_from(SPECIAL)), max_size=4),
    seed=st.integers(0, 2**31),
)
def test_every_bit_comes_back(
    name: str,
    decode: Decode,
    pack: Encode,
    groups: int,
    count: int,
    scale: float,
    special: list[tuple[int, int]],
    seed: int,
) -> None:
    """All lengths of blocks, from the shortest on; numbers of every kind at any place."""
    elements = groups * LOSSLESS[name].multiple
    numbers = gaussian(count * elements, seed, scale)
    for place, value in special:
        numbers[place % numbers.numel()] = bits(value)[0]
    for place, value in special[-1:]:  # assigning is exact, too
        assert same_bits(numbers[place % numbers.numel()], bits(value)[0])
    block = block_of(name, elements, max_slots(elements))
    try:
        raw = pack(numbers, block)
    except CheckpointError:  # too varied for this codec
        assert most_outside_by_hand(numbers, block) > LOSSLESS[name].slots(block)
        return
    assert raw.dtype == torch.uint8
    assert raw.numel() == count * block.nbytes
    assert torch.equal(raw, encode_with_numpy(numbers, block))
    assert same_bits(decoded(decode, raw, block), numbers)
    assert same_bits(referred(raw, block), numbers)
    assert bad_blocks(raw, block) == []


def most_outside_by_hand(numbers: torch.Tensor, block: BlockType) -> int:
    """By trying every window."""
    window = LOSSLESS[block.name].window
    worst = 0
    for row in numbers.view(torch.int16).view(-1, block.elements):
        counts = torch.bincount(row.int() >> 7 & 255, minlength=256)[1:]
        held = max(int(counts[start : start + window].sum()) for start in range(256 - window))
        worst = max(worst, int(counts.sum()) - held)
    return worst


@EVERY_CODEC
@EVERY_WAY
@pytest.mark.parametrize("place", [0, 1, 7, 8, 15, 16, 31, 32, 48, 63])
def test_all_values_come_back_wherever_they_stand(name: str, decode: Decode, place: int) -> None:
    """Each of the 65,536 is alone among ones: most need a slot. Places are of every low and high half, bit and byte."""
    block = block_of(name, 64, 4)
    numbers = bits(*[0x3F80] * 64).repeat(65536, 1)
    numbers.view(torch.int16)[:, place] = torch.arange(65536).sub(32768).to(torch.int16)
    raw = encode(numbers.view(-1), block)
    assert same_bits(decoded(decode, raw, block), numbers.view(-1))


@EVERY_CODEC
@EVERY_WAY
@pytest.mark.parametrize("shift", [0, 1, 31, 63])
def test_all_values_come_back_in_their_order(name: str, decode: Decode, shift: int) -> None:
    """Runs of one exponent, which mostly have a code: also 254, 255 and 1, at the ends of what a base can be."""
    block = block_of(name, 64, 8)
    numbers = torch.arange(65536).sub(32768).to(torch.int16).roll(shift).view(torch.bfloat16)
    assert same_bits(decoded(decode, encode(numbers, block), block), numbers)


@EVERY_CODEC
@EVERY_WAY
@pytest.mark.parametrize("elements", [8192, 32768 + 64, 65536])
def test_large_blocks(name: str, decode: Decode, elements: int) -> None:
    """With numbers without a code at the very ends, and all others of one sign."""
    numbers = gaussian(3 * elements, seed=elements).abs()
    numbers[:: elements - 1] = float("inf")
    block = choose_block(numbers, elements, [name])
    assert block is not None
    assert block.elements == elements
    assert same_bits(decoded(decode, encode(numbers, block), block), numbers)


@EVERY_CODEC
@EVERY_WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_are_cast_as_torch_casts(name: str, decode: Decode, dtype: torch.dtype) -> None:
    count = 300 * 1024  # several slices
    numbers = gaussian(count, seed=1, scale=3e3)
    numbers[::997] = bits(0x7F81)[0]
    numbers[::1009] = bits(0x8001)[0]
    block = choose_block(numbers, 1024, [name])
    assert block is not None
    ours, theirs = decoded(decode, encode(numbers, block), block, dtype), numbers.to(dtype)
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(ours.view(as_bits), theirs.view(as_bits))


@EVERY_CODEC
@EVERY_WAY
@pytest.mark.parametrize("offset", [1, 2, 3, 7])
def test_blocks_may_lie_anywhere(name: str, decode: Decode, offset: int) -> None:
    numbers = gaussian(2048, seed=2)
    block = block_of(name, 256, 32)
    raw = torch.cat((torch.zeros(offset, dtype=torch.uint8), encode(numbers, block)))[offset:]
    assert same_bits(decoded(decode, raw, block), numbers)
    assert bad_blocks(raw, block) == []
    apart = torch.zeros(2048, 2, dtype=torch.bfloat16)[:, 1]
    decode(apart, raw, block)
    assert same_bits(apart.contiguous(), numbers)


@EVERY_CODEC
@EVERY_WAY
def test_bases_are_modulo_256(name: str, decode: Decode) -> None:
    """No packer of ours writes them; whoever does, may."""
    block = block_of(name, 256, 8)
    raw = encode(gaussian(256 * 256, seed=3), block_of(name, 256, 32)).view(256, -1)[:, : block.nbytes].clone()
    if name == "bf16x12":
        raw[:, -24:] = 0  # position 0 has exponent 0
    else:
        raw[:, 264:296] &= ~raw[:, 296:328]  # no code is 7
    raw[:, 0] = torch.arange(256)
    assert same_bits(decoded(decode, raw.view(-1), block), referred(raw.view(-1), block))


@pytest.mark.parametrize(
    ("name", "elements", "nbytes", "message"),
    [
        ("bf16x13", 64, 104, "'bf16x13' is no lossless codec: those are bf16x12, bf16x11"),
        ("Q4_0", 32, 18, "'Q4_0' is no lossless codec"),
        ("bf16x12", 0, 8, "a multiple of 32 up to 65,536 numbers, not 0"),
        ("bf16x12", -32, 8, "a multiple of 32 up to 65,536 numbers, not -32"),
        ("bf16x12", 48, 80, "a multiple of 32 up to 65,536 numbers, not 48"),
        ("bf16x11", 96, 140, "a multiple of 64 up to 65,536 numbers, not 96"),
        ("bf16x12", 65568, 98360, "a multiple of 32 up to 65,536 numbers, not 65,568"),
        ("bf16x12", 256, 391, "256 numbers of bf16x12 take from 392 to 488 B, by whole slots, not 391"),
        ("bf16x12", 256, 395, "not 395"),  # one slot
        ("bf16x12", 256, 500, "not 500"),  # 36 slots
        ("bf16x11", 256, 364, "a size that there is|"),
        ("bf16x11", 256, 362, "not 362"),
        ("bf16x11", 256, 396, "not 396"),
    ],
)  # fmt: skip
def test_sizes_that_no_block_has_are_refused(name: str, elements: int, nbytes: int, message: str) -> None:
    if message.endswith("|"):
        assert lossless_block(name, elements, nbytes).nbytes == nbytes  # beside it, a size that there is
        return
    with pytest.raises(CheckpointError, match=re.escape(message)):
        lossless_block(name, elements, nbytes)


def damaged(name: str) -> tuple[torch.Tensor, BlockType]:
    """Ten blocks, of which 3 and 7 are damaged."""
    block = block_of(name, 64, 4)
    raw = encode(bits(*[0x3F80, 0xC020] * 320), block).view(10, -1)
    for number in (3, 7):
        if name == "bf16x12":
            raw[number, -5] = 64 if number == 3 else 0  # the high byte of the last position
            raw[number, -6] = 64
        else:
            raw[number, 72:96:8] |= 31  # five numbers of code 7
    return raw.view(-1), block


@EVERY_CODEC
@EVERY_WAY
def test_damage_is_one_error_on_a_cpu(name: str, decode: Decode) -> None:
    raw, block = damaged(name)
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(CheckpointError, match=rf"^block 3 of {name} is damaged: .*\. Get the file again"):
            decoded(decode, raw, block, dtype)
    assert bad_blocks(raw, block) == [3, 7]
    sane = raw.view(10, -1)[4:7].reshape(-1)
    assert same_bits(decoded(decode, sane, block), bits(*[0x3F80, 0xC020] * 96))


@EVERY_CODEC
def test_damage_is_masked_on_a_device(name: str, sim: SimDevice) -> None:
    """Nothing is written or read elsewhere; what is whole stays so."""
    raw, block = damaged(name)
    target = torch.empty(640, dtype=torch.bfloat16).to(sim.device)
    decode_into(target, raw.to(sim.device), block)
    whole = [number for number in range(10) if number not in (3, 7)]
    assert same_bits(target.cpu().view(10, 64)[whole].view(-1), bits(*[0x3F80, 0xC020] * 256))


@EVERY_CODEC
@EVERY_WAY
@settings(max_examples=200, deadline=None)
@given(groups=st.integers(1, 5), slots=st.integers(0, 2), seed=st.integers(0, 2**31), zeros=st.booleans())
def test_any_bytes_are_numbers_or_an_error(
    name: str, decode: Decode, groups: int, slots: int, seed: int, zeros: bool
) -> None:
    elements = groups * 64
    block = block_of(name, elements, 4 * slots)
    raw = torch.randint(0, 256, (block.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes_at = HEAD_BYTES + elements
    if zeros and name == "bf16x11":
        raw[codes_at : codes_at + elements // 8] &= raw[codes_at + elements // 8 : codes_at + elements // 4]
        raw[codes_at : codes_at + elements // 8 - 1] = 0  # few of code 7, which fit
    elif zeros:
        raw[codes_at + elements // 2 + 1 : codes_at + elements // 2 + 8 * slots : 2] = 0
    try:
        theirs = bits(*reference(bytes(raw.tolist()), block))
    except (IndexError, StopIteration):
        with pytest.raises(CheckpointError, match="block 0 of"):
            decoded(decode, raw, block)
    else:
        assert same_bits(decoded(decode, raw, block), theirs)


@EVERY_CODEC
def test_every_bit_of_a_number_is_proved(name: str) -> None:
    """Each bit of a block is turned over, one block each: whatever gives another number is found."""
    block = block_of(name, 128, 8)
    numbers = gaussian(128, seed=4).clamp(min=0.003)
    numbers[3] = float("inf")
    raw = encode(numbers, block).repeat(8 * block.nbytes, 1)
    bit = torch.arange(8 * block.nbytes)
    raw[bit, bit // 8] ^= (1 << bit % 8).to(torch.uint8)
    unharmed = []
    for number, one in enumerate(raw):
        try:
            same = same_bits(decoded(decode_with_torch, one, block), numbers)
        except CheckpointError:
            same = False
        if same and number // 8 not in (4, 5, 6, 7):
            unharmed.append(number)
    assert bad_blocks(raw.view(-1), block) == [number for number in bit.tolist() if number not in unharmed]
    assert len(unharmed) < 8 * 16  # bytes 1 to 3, slots that are not needed, a code that is not used


@EVERY_CODEC
@pytest.mark.parametrize("elements", [64, 4096, 65536])
def test_memory_for_decoding_on_a_device_is_planned(name: str, elements: int, sim: SimDevice) -> None:
    """With as many slots as there can be, in more than one slice, so that what one leaves behind would count."""
    block = block_of(name, elements, max_slots(elements))
    count = (DEVICE_SLICE_ELEMENTS + 2 * elements) // elements
    numbers = gaussian(2 * elements, seed=5).repeat(-(-count // 2))[: count * elements]
    one = encode(numbers[: 2 * elements], block)
    raw = one.repeat(-(-count // 2))[: count * block.nbytes].to(sim.device)
    for dtype in (torch.bfloat16, torch.float16):
        target = torch.empty(count * elements, dtype=dtype, device=sim.device)
        sim.peak_bytes = before = sim.allocated_bytes
        decode_into(target, raw, block)
        assert sim.peak_bytes - before <= DECODE_SCRATCH_BYTES
        assert sim.allocated_bytes == before
    assert same_bits(target.cpu(), numbers.half())


@EVERY_CODEC
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 8), parts=st.integers(1, 5))
def test_the_room_is_counted_exactly(name: str, seed: int, spread: float, parts: int) -> None:
    """By parts, too: the block has the slots that the worst block needs, and four fewer would not do."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(20 * 192, generator=generator) * spread).exp2().bfloat16()
    survey = Survey(192, [name])
    for part in numbers.view(20, 192).chunk(parts):
        survey.add(part.reshape(-1))
    block = survey.block()
    assert block == choose_block(numbers, 192, [name])
    needed = most_outside_by_hand(numbers, block_of(name, 192, 0))
    fours = -(-needed // 4) * 4
    if block is None:
        assert fours > max_slots(192) or LOSSLESS[name].nbytes(192, fours) > 0.99 * 2 * 192
        return
    assert block == block_of(name, 192, fours)
    encode(numbers, block)
    if fours:
        with pytest.raises(CheckpointError, match=rf"of {name} has more than {fours - 4} exponents outside"):
            encode(numbers, block_of(name, 192, fours - 4))


def narrow(count: int) -> torch.Tensor:
    return gaussian(count, seed=6).abs().clamp(min=0.005).bfloat16()


def flat(count: int) -> torch.Tensor:
    """Twelve exponents, of each as many."""
    return torch.arange(count).remainder(12).neg().float().exp2()


def wide(count: int) -> torch.Tensor:
    """Any bits at all: no window holds them."""
    return (
        torch.randint(-32768, 32768, (count,), generator=torch.Generator().manual_seed(7)).short().view(torch.bfloat16)
    )


@pytest.mark.parametrize(
    ("make", "row_length", "chosen", "elements"),
    [
        (narrow, 4096, "bf16x11", 4096),
        (partial(gaussian, seed=6), 4096, "bf16x11", 4096),
        (partial(gaussian, seed=6), 96, "bf16x12", 96),  # no multiple of 64 divides it
        (flat, 640, "bf16x12", 640),
        (partial(gaussian, seed=6), 65536 * 3, "bf16x11", 65536),
        (partial(gaussian, seed=6), 65600, "bf16x11", 13120),  # 65,600 is too many, and so is half of it for no one
        (torch.zeros, 128, "bf16x11", 128),
        (partial(gaussian, seed=6), 100, None, None),
        (partial(gaussian, seed=6), 1, None, None),
        (wide, 4096, None, None),
    ],
)
def test_the_smallest_is_chosen(
    make: Callable[[int], torch.Tensor], row_length: int, chosen: str | None, elements: int | None
) -> None:
    numbers = make(row_length * 4).bfloat16()
    block = choose_block(numbers, row_length)
    assert (block and block.name, block and block.elements) == (chosen, elements)
    if block is not None:
        each = [choose_block(numbers, row_length, [name]) for name in LOSSLESS]
        assert block.nbytes / block.elements == min(one.nbytes / one.elements for one in each if one)
        assert block.nbytes <= 0.99 * 2 * block.elements
        assert same_bits(decoded(decode_into, encode(numbers, block), block), numbers)


def test_numpy_counts_as_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = gaussian(64 * 3000, seed=8)
    numbers[::777] = 1e30
    chosen = [choose_block(numbers, length, [name]) for name in LOSSLESS for length in (64, 192, 3000 * 64)]
    monkeypatch.setattr("airstream.codecs.lossless_pack.count_outside", lambda: None)
    assert chosen == [choose_block(numbers, length, [name]) for name in LOSSLESS for length in (64, 192, 3000 * 64)]
    assert None not in chosen[1:3]


@EVERY_CODEC
@settings(max_examples=30, deadline=None)
@given(groups=st.integers(4, 40), count=st.integers(1, 9), seed=st.integers(0, 2**31), spread=st.floats(0.01, 6))
def test_windows_that_were_counted_make_the_same_bytes(
    name: str, groups: int, count: int, seed: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(count * groups * 64, generator=generator) * spread).exp2().bfloat16()
    numbers[::97] = bits(0, 0x8000, 1, 0x7F80, 0xFFC1)[seed % 5]
    survey = Survey(groups * 64)  # of both codecs at once
    survey.add(numbers)
    block = block_of(name, groups * 64, max_slots(groups * 64))
    if most_outside_by_hand(numbers, block) <= LOSSLESS[name].slots(block):
        assert torch.equal(encode(numbers, block, survey.bases(block)), encode_with_numpy(numbers, block))


@EVERY_CODEC
def test_every_number_there_is_packs_to_the_bytes_of_numpy(name: str) -> None:
    """With as many neighbours around zero's exponent as it takes for them to have slots."""
    every = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16)
    numbers = torch.zeros((len(every) // 64, 1024), dtype=torch.int16)
    numbers[:, ::16] = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(4))].view(-1, 64)
    block = block_of(name, 1024, max_slots(1024))
    survey = Survey(1024)
    survey.add(numbers)
    raw = encode(numbers, block, survey.bases(block))
    assert torch.equal(raw, encode_with_numpy(numbers, block))
    assert same_bits(decoded(decode_into, raw, block), numbers.view(torch.bfloat16).view(-1))


@EVERY_CODEC
def test_wrong_windows_make_the_same_numbers_or_none(name: str) -> None:
    """Nothing is lost where a file has changed since it was looked at."""
    numbers = gaussian(8 * 512, seed=9)
    block = block_of(name, 512, max_slots(512))
    for base in range(1, 256, 3):
        with suppress(CheckpointError):
            raw = encode(numbers, block, torch.full((8,), base, dtype=torch.uint8))
            assert same_bits(decoded(decode_into, raw, block), numbers)
    with pytest.raises(ValueError, match="7 windows cannot be those of"):
        encode(numbers, block, torch.zeros(7, dtype=torch.uint8))


def test_checksums_are_those_of_zlib() -> None:
    data = torch.randint(0, 256, (3 * 700,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    for size in range(1, 700):
        rows = data[: 3 * size].view(3, size)
        assert [each & 0xFFFFFFFF for each in checksums(rows).tolist()] == [zlib.crc32(row.numpy()) for row in rows]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@EVERY_CODEC
def test_there_are_kernels_where_there_is_a_compiler(name: str) -> None:
    """Else the tests of kernels would test torch and numpy twice."""
    assert decoder(name, 64, 4)
    assert encoder(name, 64, 4)
    assert count_outside()


def test_what_is_asked_for_in_the_wrong_way_is_refused() -> None:
    block = block_of("bf16x12", 64, 4)
    assert encode(torch.zeros(0, dtype=torch.bfloat16), block).numel() == 0
    with pytest.raises(ValueError, match="65 values cannot be blocks of 64"):
        encode(torch.zeros(65, dtype=torch.bfloat16), block)
    with pytest.raises(ValueError, match="117 bytes of bf16x12 do not make 64 numbers"):
        decode_into(torch.empty(64), torch.zeros(117, dtype=torch.uint8), block)


@EVERY_WAY
@pytest.mark.parametrize(
    "block", [BlockType("bf16x12", 48, 80), BlockType("bf16x11", 64, 65536), BlockType("bf16x12", 64, 4)]
)
def test_a_block_that_cannot_be_is_not_decoded(decode: Decode, block: BlockType) -> None:
    with pytest.raises(CheckpointError, match=f"{block.elements}"):
        decode(torch.empty(block.elements), torch.zeros(block.nbytes, dtype=torch.uint8), block)


def test_blocks_of_gguf_are_computed_in_float32() -> None:
    assert {block.dtype for block in BLOCK_TYPES.values()} == {"float32"}
    assert block_of("bf16x12", 64, 4).dtype == "bfloat16"
