"""This handles small fields inside bytes, eight bytes at a time: that is cheapest for packed numbers in torch.

A tensor operation costs about the same for an int64 as for a byte, so that masks and shifts run on eight bytes viewed
as one word wherever their fields cannot run into each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Unpacked(NamedTuple):
    """What a block holds, taken apart: a number of it is worth `numbers * scale + shift`, in that order.

    Attributes:
        numbers: shape (blocks, groups, elements of a group), small integers, or float32 where `scale` is None.
        scale: float32 of shape (blocks, groups, 1).
        shift: as `scale`; None where there is none.
    """

    numbers: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None


def repeated(byte: int) -> int:
    """A word of eight times `byte`, as the signed number that torch takes."""
    return signed(byte * 0x0101_0101_0101_0101)


def signed(word: int) -> int:
    """The int64 of the bits of `word`."""
    return word - (1 << 64) if word >> 63 else word


def words_of(data: torch.Tensor) -> torch.Tensor:
    """`data` of shape (..., n) bytes, n a multiple of 8, as words of shape (..., n / 8). Copies."""
    return data.clone(memory_format=torch.contiguous_format).view(torch.int64)


def bytes_of(words: torch.Tensor) -> torch.Tensor:
    """The bytes of contiguous `words`, of shape (..., 8 * n)."""
    return words.view(torch.uint8)


def field(words: torch.Tensor, shift: int, mask: int) -> torch.Tensor:
    """Of each byte, `byte >> shift & mask`."""
    return (words >> shift if shift else words).bitwise_and(repeated(mask & 0xFF >> shift))


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """The low halves of the bytes, then the high ones: (..., n) words -> (..., 2, n) words."""
    result = torch.empty((*words.shape[:-1], 2, words.shape[-1]), dtype=torch.int64, device=words.device)
    torch.bitwise_and(words, repeated(0x0F), out=result[..., 0, :])
    torch.bitwise_and(words >> 4, repeated(0x0F), out=result[..., 1, :])
    return result


def spread_bits(data: torch.Tensor, place: int) -> torch.Tensor:
    """Each bit of every byte, lowest first, as a byte with that bit at `place`: (..., n) bytes -> (..., n) words."""
    copies = data.to(torch.int64).mul_(repeated(1))
    picked = copies.bitwise_and_(signed(0x8040_2010_0804_0201)).add_(repeated(0x7F))  # bit 7 is set if any bit was
    return (picked >> 7 - place).bitwise_and_(repeated(1 << place))


def half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The half-precision number at byte `start` of each block: (n, bytes) -> (n, 1, 1) float32."""
    return blocks[:, start : start + 2].view(torch.float16).float().unsqueeze(1)
