"""What lossless blocks cost and win: `python -m benchmarks.lossless [--weights FILE]`. One thread, no model.

It prints GB/s of plain numbers, by processor time, and the sizes that windows of exponents give, for other types of
numbers too, of gaussian weights or of those in a file.
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from collections.abc import Callable, Iterator

import torch
from safetensors import safe_open

from airstream.codecs.block_types import BlockType
from airstream.codecs.decode import decode_into, decode_with_torch
from airstream.codecs.lossless import bad_blocks
from airstream.codecs.lossless_blocks import LOSSLESS
from airstream.codecs.lossless_pack import choose_block, encode, encode_with_numpy

ELEMENTS = 32 << 20
"""More than caches hold: what is decoded comes from memory, and goes there."""
SECONDS = 0.5
MANTISSA_BITS = {torch.bfloat16: (7, 8), torch.float16: (10, 5), torch.float32: (23, 8)}
"""Bits of the mantissa, and of the exponent."""


def gigabytes_per_second(call: Callable[[], object], nbytes: int) -> float:
    """By the fastest call; others may want the processor too."""
    best, start = math.inf, time.thread_time()
    call()
    while time.thread_time() - start < SECONDS:
        before = time.thread_time()
        call()
        best = min(best, time.thread_time() - before)
    return nbytes / best / 1e9


def rates(numbers: torch.Tensor, block: BlockType) -> Iterator[tuple[str, float]]:
    """What each step does in a second, in GB of plain numbers."""
    raw, target = encode(numbers, block), torch.empty_like(numbers)
    some = numbers[: 16 * block.elements]
    plain = 2 * numbers.numel()
    yield "decode", gigabytes_per_second(lambda: decode_into(target, raw, block), plain)
    yield "decode, torch", gigabytes_per_second(lambda: decode_with_torch(target, raw, block), plain)
    yield "encode", gigabytes_per_second(lambda: encode(numbers, block), plain)
    yield "encode, numpy", gigabytes_per_second(lambda: encode_with_numpy(some, block), 2 * some.numel())
    yield "count", gigabytes_per_second(lambda: choose_block(numbers, block.elements, [block.name]), plain)
    yield "verify", gigabytes_per_second(lambda: bad_blocks(raw, block), plain)
    yield "CRC-32", gigabytes_per_second(lambda: zlib.crc32(numbers.view(torch.int16).numpy().data), plain)


def sizes(numbers: torch.Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """The share of plain bytes that is left: with 4-bit codes, with 3-bit codes, and by the entropy of exponents."""
    mantissa, bits = MANTISSA_BITS[dtype]
    as_bits = numbers.to(dtype).view(torch.int32 if dtype.itemsize == 4 else torch.int16)
    counts = torch.bincount((as_bits.reshape(-1) >> mantissa & (1 << bits) - 1).int(), minlength=1 << bits).double()
    share = counts / counts.sum()
    entropy = -float((share * share.clamp(min=1e-300).log2()).sum())
    plain = 1 + mantissa + bits

    def coded(code_bits: int, window: int, slot_bits: int) -> float:
        held = max(float(share[1:][start : start + window].sum()) for start in range(len(share) - 1))
        return (1 + mantissa + code_bits + (1 - float(share[0]) - held) * slot_bits) / plain

    return coded(4, 15, 24), coded(3, 6, 8), (1 + mantissa + entropy) / plain


def tensors(file: str | None) -> Iterator[torch.Tensor]:
    """The matrices of `file`, or one of gaussian weights."""
    if file is None:
        yield torch.randn(4096, ELEMENTS // 4096, generator=torch.Generator().manual_seed(0)) * 0.02
        return
    with safe_open(file, "pt") as opened:
        names = opened.keys()
        yield from (opened.get_tensor(name) for name in names if opened.get_slice(name).get_shape()[1:])


def packed_share(file: str | None, names: list[str]) -> float:
    """The bytes of all matrices as blocks, over their plain bytes."""
    packed = plain = 0.0
    for tensor in tensors(file):
        numbers = tensor.bfloat16().contiguous().view(-1)
        block = choose_block(numbers, tensor.shape[-1], names)
        plain += 2 * numbers.numel()
        packed += numbers.numel() // block.elements * block.nbytes if block else 2 * numbers.numel()
    return packed / plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="a safetensors file")
    parser.add_argument("--rows", type=int, nargs="+", default=[576, 4096, 16384], help="numbers in a block")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in LOSSLESS:
        for row_length in arguments.rows:
            numbers = (torch.randn(ELEMENTS // row_length * row_length) * 0.02).bfloat16()
            block = choose_block(numbers, row_length, [name])
            assert block is not None
            each = ", ".join(f"{what} {rate:.2f}" for what, rate in rates(numbers, block))
            print(f"{name}, {block.elements:,} numbers in {block.nbytes:,} bytes: {each} GB/s", flush=True)
    for names in (["bf16x12"], ["bf16x11"], list(LOSSLESS)):
        print(f"{' or '.join(names)}: {packed_share(arguments.weights, names):.2%} of plain bfloat16")
    everything = torch.cat([tensor.float().view(-1) for tensor in tensors(arguments.weights)])
    for dtype in MANTISSA_BITS:
        four, three, ideal = sizes(everything, dtype)
        print(f"{dtype}: 4-bit codes {four:.1%}, 3-bit codes {three:.1%}, entropy of exponents {ideal:.1%}")


if __name__ == "__main__":
    main()
