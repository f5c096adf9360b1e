"""This says which blocks of lossless bfloat16 there are: a packer chooses their numbers and bytes for each tensor.

It is all that whoever reads headers has to know of them. It refuses to know how a block is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from airstream.codecs.block_types import BlockType
from airstream.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Lossless:
    """How blocks of bfloat16 lie that give every bit back: docs/formats.md has the bytes.

    A block is a head, a byte of sign and mantissa for each number, a code of `code_bits` for its exponent, and a fixed
    number of slots for exponents that no code stands for.

    Attributes:
        multiple: what the numbers of a block are a multiple of.
        window: consecutive exponents that have a code. Exponent 0 has one besides.
        slot_bytes: bytes of a slot.
    """

    name: str
    code_bits: int
    multiple: int
    window: int
    slot_bytes: int

    def nbytes(self, elements: int, slots: int) -> int:
        """The bytes of a block of `elements` numbers with `slots` slots."""
        return HEAD_BYTES + elements + elements * self.code_bits // 8 + self.slot_bytes * slots

    def slots(self, block: BlockType) -> int:
        """The slots that `block` has. Raises CheckpointError as `lossless_block` does: kernels believe sizes."""
        lossless_block(self.name, block.elements, block.nbytes)
        return (block.nbytes - self.nbytes(block.elements, 0)) // self.slot_bytes


HEAD_BYTES = 8
MAX_ELEMENTS = 65536
"""Numbers of the largest lossless block: two bytes say which of them."""

SLOTS_MULTIPLE = 4
"""Slots come in fours, so that the bytes of every block are a multiple of four."""

LOSSLESS: Mapping[str, Lossless] = {
    codec.name: codec
    for codec in (
        Lossless("bf16x12", code_bits=4, multiple=32, window=15, slot_bytes=3),
        Lossless("bf16x11", code_bits=3, multiple=64, window=6, slot_bytes=1),
    )
}


def max_slots(elements: int) -> int:
    """The slots that a lossless block may have: more of them would win nothing."""
    return max(elements // 8, SLOTS_MULTIPLE)


def lossless_block(name: str, elements: int, nbytes: int) -> BlockType:
    """The lossless type `name` with blocks of `nbytes` bytes for `elements` numbers.

    Raises:
        CheckpointError: there is no such block.
    """
    codec = LOSSLESS.get(name)
    if codec is None:
        raise CheckpointError(f"{name!r} is no lossless codec: those are {', '.join(LOSSLESS)}")
    if not codec.multiple <= elements <= MAX_ELEMENTS or elements % codec.multiple:
        limits = f"a multiple of {codec.multiple} up to {MAX_ELEMENTS:,}"
        raise CheckpointError(f"blocks of {name} have {limits} numbers, not {elements:,}")
    slots, rest = divmod(nbytes - codec.nbytes(elements, 0), codec.slot_bytes)
    if rest or slots % SLOTS_MULTIPLE or not 0 <= slots <= max_slots(elements):
        least, most = codec.nbytes(elements, 0), codec.nbytes(elements, max_slots(elements))
        raise CheckpointError(
            f"{elements:,} numbers of {name} take from {least:,} to {most:,} B, by whole slots, not {nbytes:,}"
        )
    return BlockType(name, elements, nbytes, dtype="bfloat16")


def damage(block: BlockType, number: int) -> str:
    """What is wrong with a block of type `block`, the `number`-th from 0, that cannot be unpacked."""
    if block.name == "bf16x12":
        what = f"it gives an exponent to a number beyond its {block.elements:,}"
    else:
        what = "more exponents are outside of its window than it lists"
    return f"block {number:,} of {block.name} is damaged: {what}. Get the file again, or pack it anew"
