"""This decodes blocks of bfloat16 that give every bit back, and proves them by their checksums.

On a device it waits for nothing: what a damaged block says of places that are not there is masked. On a CPU a damaged
block is one error. It knows bytes and tensors. It refuses to know how numbers became blocks: `lossless_pack` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from airstream.codecs.block_types import BlockType
from airstream.codecs.lossless_blocks import HEAD_BYTES, LOSSLESS, damage
from airstream.codecs.lossless_native import Kernel, checksums, decoder
from airstream.codecs.words import bytes_of, nibbles, spread_bits, words_of
from airstream.errors import CheckpointError

SIGN_AND_MANTISSA = 0x807F - 0x10000
"""The bits of a bfloat16 that are no exponent, as an int16."""

EXPONENT_PLACE = 7

STEP_ELEMENTS = 1 << 17
"""Numbers that are proved at a time, unless a block has more."""


class Exponents(NamedTuple):
    """The exponents of some blocks, of shape (blocks, numbers), and which blocks are damaged, of shape (blocks,)."""

    values: torch.Tensor
    damaged: torch.Tensor


def decode_lossless(target: torch.Tensor, raw: torch.Tensor, block: BlockType, max_elements: int, native: bool) -> None:
    """Write the numbers of `raw`, whole blocks, to `target`, `max_elements` of them, or one block, at a time.

    Where torch decodes, that takes 8 bytes of memory for each of `max_elements`; a kernel takes one, and only if the
    numbers are to be of another dtype than bfloat16. Does not block where torch does not.

    Raises:
        CheckpointError: there is no such block; or, on a CPU, one is damaged: the message has its number, from 0.
    """
    kernel = _kernel(block) if native and raw.device.type == "cpu" else None
    decode = kernel or partial(decode_with_torch, block=block)
    blocks, numbers = raw.view(-1, block.nbytes), target.view(-1, block.elements)
    in_place = target.dtype == torch.bfloat16 and target.is_contiguous()
    step = max(1, (max_elements if in_place else max_elements // 2) // block.elements)
    if kernel is not None and in_place:
        step = max(1, len(blocks))  # which takes no memory
    for start in range(0, len(blocks), step):
        some, wanted = blocks[start : start + step], numbers[start : start + step]
        exact = wanted if in_place else torch.empty(wanted.shape, dtype=torch.bfloat16, device=target.device)
        whole = decode(exact.view(torch.int16), some)
        if whole < len(some):
            raise CheckpointError(damage(block, start + whole))
        if not in_place:
            wanted.copy_(exact)


def bad_blocks(raw: torch.Tensor, block: BlockType) -> list[int]:
    """The numbers, from 0, of those blocks of `raw`, on a CPU, that do not give what they were made of.

    It takes as much memory as a few numbers have, which stay in the cache of a processor, or one block.
    """
    decode = _kernel(block) or partial(decode_with_torch, block=block)
    blocks = raw.view(-1, block.nbytes)
    step = max(1, STEP_ELEMENTS // block.elements)
    numbers = torch.empty((min(step, len(blocks)), block.elements), dtype=torch.int16, device="cpu")
    sums = blocks[:, 4:HEAD_BYTES].contiguous().view(torch.int32).view(-1)
    bad, start = [], 0
    while start < len(blocks):
        some = blocks[start : start + step]
        whole = decode(numbers[: len(some)], some)
        end = start + whole
        wrong = checksums(numbers[:whole]).ne(sums[start:end]).nonzero().view(-1) + start
        bad += [*wrong.tolist(), *([end] if whole < len(some) else [])]
        start = end + (whole < len(some))
    return bad


def decode_with_torch(target: torch.Tensor, blocks: torch.Tensor, block: BlockType) -> int:
    """Write bits of bfloat16 of `blocks` (n, nbytes) to `target`, int16 of shape (n, numbers), on any device.

    Returns:
        On a CPU, how many blocks come before the first damaged one; elsewhere, all of them.
    """
    exponents = EXPONENTS[block.name](blocks, block)
    rest = blocks[:, HEAD_BYTES : HEAD_BYTES + block.elements].view(torch.int8).to(torch.int16)  # the sign in bits 7-15
    rest.bitwise_and_(SIGN_AND_MANTISSA)
    target.copy_(exponents.values).bitwise_left_shift_(EXPONENT_PLACE).bitwise_or_(rest)
    if blocks.device.type != "cpu" or not exponents.damaged.any():
        return len(blocks)
    return int(exponents.damaged.nonzero()[0])


def _kernel(block: BlockType) -> Kernel | None:
    return decoder(block.name, block.elements, LOSSLESS[block.name].slots(block))


def _exponents_x12(blocks: torch.Tensor, block: BlockType) -> Exponents:
    codes_at = HEAD_BYTES + block.elements
    patches_at, slots = codes_at + block.elements // 2, LOSSLESS[block.name].slots(block)
    words = words_of(blocks[:, codes_at:patches_at]).view(-1, block.elements // 32, 2)
    values = _in_window(bytes_of(nibbles(words)).view(-1, block.elements), blocks)
    at = blocks[:, patches_at : patches_at + 2 * slots].to(torch.int32)
    places = at[:, 0::2].add(at[:, 1::2], alpha=256)
    inside = places.clamp(max=block.elements - 1)
    values.scatter_(1, inside.to(torch.int64), blocks[:, patches_at + 2 * slots :])
    return Exponents(values, (places != inside).any(1))


def _exponents_x11(blocks: torch.Tensor, block: BlockType) -> Exponents:
    codes_at, size = HEAD_BYTES + block.elements, block.elements // 8
    planes = [blocks[:, at : at + size] for at in range(codes_at, codes_at + 3 * size, size)]
    words = spread_bits(planes[0], place=0)
    for place in (1, 2):
        words.bitwise_or_(spread_bits(planes[place], place))
    values = _in_window(bytes_of(words), blocks)
    others = blocks[:, codes_at + 3 * size :][:, : LOSSLESS[block.name].slots(block)]
    sevens = planes[0] & planes[1] & planes[2]
    counts = _bits_in(sevens)
    before = counts.cumsum(1, dtype=torch.int32)  # numbers of code 7 up to the end of each byte
    found = before[:, -1:]
    if others.shape[1]:
        which = torch.arange(others.shape[1], device=blocks.device, dtype=torch.int32)
        which = which.minimum((found - 1).clamp(min=0))  # a slot that is not used repeats the last one that is
        places = _places(sevens, counts, before, which)
        listed = others.gather(1, which.to(torch.int64))
        values.scatter_(1, places, torch.where(found > 0, listed, values.gather(1, places)))
    return Exponents(values, found.squeeze(1) > others.shape[1])


def _in_window(codes: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The exponents that `codes` stand for, written over them."""
    zero = codes == 0
    return codes.add_(blocks[:, :1] - 1).masked_fill_(zero, 0)  # modulo 256


def _places(sevens: torch.Tensor, counts: torch.Tensor, before: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Where in its block the set bit of `sevens` is that has so many others before it as `which` says."""
    byte = torch.searchsorted(before, which + 1).clamp_(max=sevens.shape[1] - 1)
    nth = (which + 1).sub_(before.gather(1, byte)).add_(counts.gather(1, byte))
    bit = torch.arange(8, dtype=torch.uint8, device=sevens.device)
    bits = (sevens.gather(1, byte).unsqueeze(2) >> bit).bitwise_and_(1)
    set_so_far = torch.cumsum(bits, 2, dtype=torch.uint8, out=bits)
    places = byte.mul_(8).add_(set_so_far.lt(nth.unsqueeze(2)).sum(2))
    return places.clamp_(max=8 * sevens.shape[1] - 1)  # where there is no such bit


def _bits_in(data: torch.Tensor) -> torch.Tensor:
    """How many bits of each byte are set."""
    pairs = data - (data >> 1).bitwise_and_(0x55)
    fours = (pairs & 0x33).add_((pairs >> 2).bitwise_and_(0x33))
    return (fours + (fours >> 4)).bitwise_and_(0x0F)


EXPONENTS: Mapping[str, Callable[[torch.Tensor, BlockType], Exponents]] = {
    "bf16x12": _exponents_x12,
    "bf16x11": _exponents_x11,
}
