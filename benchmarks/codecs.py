"""How fast blocks become numbers on one thread: `python -m benchmarks.codecs [--torch]`. No disk, no model."""

from __future__ import annotations

import argparse
import time

import torch

from airstream.codecs.block_types import BLOCK_TYPES
from airstream.codecs.decode import decode_into, decode_with_torch

ELEMENTS = 4 << 20
SECONDS = 0.4


def elements_per_second(name: str, dtype: torch.dtype, device: str, with_torch: bool = False) -> float:
    """Numbers of block type `name` that become `dtype` in a second, measured on bytes that a cache does not hold."""
    block = BLOCK_TYPES[name]
    count = ELEMENTS // block.elements
    raw = torch.randint(0, 256, (count * block.nbytes,), dtype=torch.uint8).to(device)
    target = torch.empty(count * block.elements, dtype=dtype, device=device)
    decode = decode_with_torch if with_torch else decode_into
    decode(target, raw, block)
    _wait(device)
    clock = time.thread_time if device == "cpu" else time.perf_counter  # others may want the processor too
    start, rounds = clock(), 0
    while clock() - start < SECONDS:
        decode(target, raw, block)
        _wait(device)
        rounds += 1
    return rounds * target.numel() / (clock() - start)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--torch", action="store_true", help="as where airstream was installed without a C compiler")
    parser.add_argument("--types", nargs="+", default=list(BLOCK_TYPES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'type':8} {'bits':>5} {'float32':>10} {'bfloat16':>10}   millions of numbers a second, one thread")
    for name in arguments.types:
        block = BLOCK_TYPES[name]
        dtypes = (torch.float32, torch.bfloat16)
        rates = [elements_per_second(name, dtype, arguments.device, arguments.torch) for dtype in dtypes]
        bits = 8 * block.nbytes / block.elements
        print(f"{name:8} {bits:5.2f} " + " ".join(f"{rate / 1e6:10,.0f}" for rate in rates), flush=True)


if __name__ == "__main__":
    main()
