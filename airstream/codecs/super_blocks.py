"""These types have scales of scales for a block of 256 numbers: Q2_K to Q6_K, IQ4_XS.

Every function takes blocks of shape (n, bytes per block) and takes them apart into groups of 16 or 32 numbers.
"""

from __future__ import annotations

import torch

from airstream.codecs.simple import IQ4_LEVELS, levels
from airstream.codecs.words import Unpacked, bytes_of, field, half, nibbles, repeated, words_of


def q2_k(blocks: torch.Tensor) -> Unpacked:
    """Q2_K: blocks (n, 84) to numbers of shape (n, 16, 16)."""
    scales = blocks[:, :16, None]
    scale = half(blocks, 80) * (scales & 15)
    minimum = half(blocks, 82) * (scales >> 4)
    numbers = bytes_of(_crumbs(words_of(blocks[:, 16:80])))
    return Unpacked(numbers.view(len(blocks), 16, 16), scale, minimum.neg_())


def q3_k(blocks: torch.Tensor) -> Unpacked:
    """Q3_K: blocks (n, 110) to numbers of shape (n, 16, 16)."""
    numbers = _crumbs(words_of(blocks[:, 32:96])).view(len(blocks), 8, 4)
    high = words_of(blocks[:, :32])
    for group in range(8):  # of 32 numbers; its bit in `high` is set where 4 is not to be taken away
        numbers[:, group].bitwise_or_(field(high, group, 1).bitwise_left_shift_(2))
    signed = bytes_of(numbers).view(torch.int8).sub_(4)
    return Unpacked(signed.view(len(blocks), 16, 16), half(blocks, 108) * _q3_scales(blocks[:, 96:108]))


def q4_k(blocks: torch.Tensor) -> Unpacked:
    """Q4_K: blocks (n, 144) to numbers of shape (n, 8, 32)."""
    numbers = nibbles(words_of(blocks[:, 16:]).view(-1, 4, 4)).view(-1, 8, 4)
    return Unpacked(bytes_of(numbers), *_scales_and_shifts(blocks))


def q5_k(blocks: torch.Tensor) -> Unpacked:
    """Q5_K: blocks (n, 176) to numbers of shape (n, 8, 32)."""
    numbers = nibbles(words_of(blocks[:, 48:]).view(-1, 4, 4)).view(-1, 8, 4)
    high = words_of(blocks[:, 16:48])
    for group in range(8):
        numbers[:, group].bitwise_or_(field(high, group, 1).bitwise_left_shift_(4))
    return Unpacked(bytes_of(numbers), *_scales_and_shifts(blocks))


def q6_k(blocks: torch.Tensor) -> Unpacked:
    """Q6_K: blocks (n, 210) to numbers of shape (n, 16, 16)."""
    scale = half(blocks, 208) * blocks[:, 192:208, None].view(torch.int8)
    numbers = nibbles(words_of(blocks[:, :128]).view(-1, 2, 8)).view(-1, 2, 4, 4)
    high = words_of(blocks[:, 128:192]).view(-1, 2, 4)
    numbers[:, :, 0].bitwise_or_((high & repeated(0x03)).bitwise_left_shift_(4))
    numbers[:, :, 1].bitwise_or_((high & repeated(0x0C)).bitwise_left_shift_(2))
    numbers[:, :, 2].bitwise_or_(high & repeated(0x30))
    numbers[:, :, 3].bitwise_or_(high.bitwise_right_shift_(2).bitwise_and_(repeated(0x30)))
    return Unpacked(bytes_of(numbers).view(torch.int8).sub_(32).view(len(blocks), 16, 16), scale)


def iq4_xs(blocks: torch.Tensor) -> Unpacked:
    """IQ4_XS: blocks (n, 136) to numbers of shape (n, 8, 32)."""
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=2).view(-1, 8, 1)
    high = torch.stack([blocks[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).view(-1, 8, 1)
    scale = half(blocks, 0) * (low | high << 4).view(torch.int8).sub_(32)
    numbers = nibbles(words_of(blocks[:, 8:]).view(-1, 8, 2)).view(-1, 8, 4)
    return Unpacked(levels(bytes_of(numbers), IQ4_LEVELS), scale)


def _crumbs(words: torch.Tensor) -> torch.Tensor:
    """Four numbers of two bits a byte, the lowest of 32 bytes first: (n, 8) words -> (n, 2, 4, 4) words."""
    result = torch.empty((len(words), 2, 4, 4), dtype=torch.int64, device=words.device)
    halves = words.view(len(words), 2, 4)
    for place in range(4):
        torch.bitwise_and(halves >> 2 * place if place else halves, repeated(0x03), out=result[:, :, place])
    return result


def _scales_and_shifts(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Q4_K and Q5_K: eight scales and eight minima of six bits, in twelve bytes. Two of shape (n, 8, 1)."""
    packed = blocks[:, 4:16].clone().view(torch.int32)  # three words of four bytes each
    first, second, third = packed[:, :1], packed[:, 1:2], packed[:, 2:]
    high = (packed[:, :2] >> 2).bitwise_and_(0x3030_3030)
    fields = torch.empty((len(blocks), 4), dtype=torch.int32, device=blocks.device)
    torch.bitwise_and(first, 0x3F3F_3F3F, out=fields[:, :1])
    torch.bitwise_or(third & 0x0F0F_0F0F, high[:, :1], out=fields[:, 1:2])
    torch.bitwise_and(second, 0x3F3F_3F3F, out=fields[:, 2:3])
    torch.bitwise_or((third >> 4).bitwise_and_(0x0F0F_0F0F), high[:, 1:], out=fields[:, 3:])
    six_bits = fields.view(torch.uint8).unsqueeze(-1)
    return half(blocks, 0) * six_bits[:, :8], (half(blocks, 2) * six_bits[:, 8:]).neg_()


def _q3_scales(packed: torch.Tensor) -> torch.Tensor:
    """Sixteen scales of six bits: nibbles of eight bytes, and pairs of bits of four more. Shape (n, 16, 1)."""
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=1)
    high = torch.cat([packed[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
    return (low | high << 4).view(torch.int8).sub_(32).unsqueeze(-1)
