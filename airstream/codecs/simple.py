"""These types have one scale for a block of numbers: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4. It has 32 of them.

Every function takes blocks of shape (n, bytes per block) and takes them apart into one group of numbers each.
"""

from __future__ import annotations

import torch

from airstream.codecs.words import Unpacked, bytes_of, half, nibbles, spread_bits, words_of

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the sixteen values of the non-linear 4-bit types stand for."""

FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the numbers of the 4-bit floating-point type E2M1."""


def q4_0(blocks: torch.Tensor) -> Unpacked:
    """Q4_0: blocks (n, 18) to numbers of shape (n, 1, 32)."""
    return Unpacked(_four_bits(blocks[:, 2:]).view(torch.int8).sub_(8), half(blocks, 0))


def q4_1(blocks: torch.Tensor) -> Unpacked:
    """Q4_1: blocks (n, 20) to numbers of shape (n, 1, 32)."""
    return Unpacked(_four_bits(blocks[:, 4:]), half(blocks, 0), half(blocks, 2))


def q5_0(blocks: torch.Tensor) -> Unpacked:
    """Q5_0: blocks (n, 22) to numbers of shape (n, 1, 32)."""
    return Unpacked(_five_bits(blocks[:, 2:]).view(torch.int8).sub_(16), half(blocks, 0))


def q5_1(blocks: torch.Tensor) -> Unpacked:
    """Q5_1: blocks (n, 24) to numbers of shape (n, 1, 32)."""
    return Unpacked(_five_bits(blocks[:, 4:]), half(blocks, 0), half(blocks, 2))


def q8_0(blocks: torch.Tensor) -> Unpacked:
    """Q8_0: blocks (n, 34) to numbers of shape (n, 1, 32)."""
    return Unpacked(blocks[:, None, 2:].view(torch.int8), half(blocks, 0))


def iq4_nl(blocks: torch.Tensor) -> Unpacked:
    """IQ4_NL: blocks (n, 18) to numbers of shape (n, 1, 32)."""
    return Unpacked(levels(_four_bits(blocks[:, 2:]), IQ4_LEVELS), half(blocks, 0))


def mxfp4(blocks: torch.Tensor) -> Unpacked:
    """MXFP4: blocks (n, 17) to numbers of shape (n, 1, 32)."""
    exponent = blocks[:, None, :1].to(torch.int32)
    tiny = torch.full_like(exponent, 0x0020_0000) << exponent.clamp(max=1)
    scale = torch.where(exponent < 2, tiny, (exponent - 1) << 23).view(torch.float32)  # half of 2 ** (exponent - 127)
    return Unpacked(levels(_four_bits(blocks[:, 1:]), FP4_LEVELS), scale)


def levels(numbers: torch.Tensor, table: tuple[int, ...]) -> torch.Tensor:
    """What `numbers`, bytes, stand for in `table`, as int8."""
    values = torch.tensor(table, dtype=torch.int8, device=numbers.device)
    return values.index_select(0, numbers.reshape(-1).int()).view(numbers.shape)


def _four_bits(data: torch.Tensor) -> torch.Tensor:
    """(n, 16) bytes -> (n, 1, 32) bytes: the low halves, then the high ones."""
    return bytes_of(nibbles(words_of(data)).view(len(data), 1, 4))


def _five_bits(data: torch.Tensor) -> torch.Tensor:
    """(n, 4 + 16) bytes, fifth bits and then nibbles -> (n, 1, 32) bytes."""
    words = nibbles(words_of(data[:, 4:])).view(len(data), 4)
    return bytes_of(words.bitwise_or_(spread_bits(data[:, :4], place=4)).unsqueeze(1))
