"""This measures what it takes on this machine to multiply with weights as they are stored, or to make them dense.

What a core takes is measured while all of them are at it, since two may be one that takes turns, and with more bytes
than its own caches hold, since weights come from memory. It refuses to know how that is done, and what is planned.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from airstream.codecs.block_types import BlockType
from airstream.codecs.decode import decode_into
from airstream.codecs.in_place import may_unpack, unpack_in_place
from airstream.codecs.lossless_blocks import LOSSLESS, SLOTS_MULTIPLE, lossless_block
from airstream.codecs.lossless_pack import choose_block, encode
from airstream.codecs.products import RowFormat, StoredRows, make_dense, multiply

__all__ = ["decoding_seconds", "dense_seconds", "product_seconds"]

STORED_BYTES = 16 << 20
"""Of weights that are multiplied with in turn: more than the caches of a few cores, less than plans set aside."""

DENSE_ELEMENTS = 4 << 20
"""Numbers that are made dense: twice as many bytes."""

RUNS = 4
"""The first one warms up, and the fastest of the others counts: whatever else the machine does can only add to it."""


def product_seconds(how: RowFormat, rows: int) -> float:
    """What one number of a weight of `rows` and of one vector takes a core, with what a product takes however small it
    is. Measured by the first call, in milliseconds.
    """
    if how.block is not None and how.block.name in LOSSLESS:
        return _lossless_product_seconds(how.block.name, how.block.elements, how.columns)
    return _product_seconds(how, max(1, min(rows, STORED_BYTES // how.row_bytes)))


@functools.cache
def _product_seconds(how: RowFormat, rows: int) -> float:
    return _seconds_each(_weights(how, rows, max(1, STORED_BYTES // (rows * how.row_bytes))))


@functools.cache
def _lossless_product_seconds(name: str, elements: int, columns: int) -> float:
    """Of rows of blocks like those of trained weights, whichever room each tensor's blocks have."""
    block, raw = _typical(lossless_block(name, elements, LOSSLESS[name].nbytes(elements, SLOTS_MULTIPLE)))
    how = RowFormat("lossless", columns, columns // elements * block.nbytes, elements, block)
    rows = raw.numel() // how.row_bytes
    return _seconds_each([StoredRows(how, rows, raw.view(-1)[: rows * how.row_bytes])])


def _seconds_each(weights: Sequence[StoredRows]) -> float:
    """What it takes a core to multiply one number of `weights`, one behind the other, with one of a vector."""
    columns = weights[0].format.columns
    vector = torch.zeros((1, columns), dtype=torch.float32, device="cpu")
    turns = itertools.cycle(weights)

    def work() -> None:
        for _ in weights:
            multiply(next(turns), vector)

    return _core_seconds(work) / sum(each.rows * columns for each in weights)


@functools.cache
def dense_seconds(kind: str) -> float:
    """What it takes a core to write a number of `kind`, "fp8" or "int4", to memory in bfloat16."""
    columns = 4096
    how = RowFormat(kind, columns, columns // (2 if kind == "int4" else 1), 128)
    weight = _weights(how, DENSE_ELEMENTS // columns, 1)[0]
    out = torch.empty((weight.rows, columns), dtype=torch.bfloat16, device="cpu")
    return _core_seconds(lambda: make_dense(weight, 0, out)) / out.numel()


@functools.cache
def decoding_seconds(block: BlockType) -> float:
    """What one number of type `block` takes a core to decode. Measured by the first call, in milliseconds."""
    block, raw = _typical(block)
    blocks, dtype = raw.view(-1, block.nbytes), getattr(torch, block.dtype)
    if may_unpack(block, dtype):
        numbers = torch.empty(len(blocks) * block.elements, dtype=dtype, device="cpu")
        return _core_seconds(lambda: unpack_in_place(numbers, raw.view(-1), block)) / numbers.numel()
    target = torch.empty((len(blocks), block.elements), dtype=dtype, device="cpu")

    def decode(part: torch.Tensor, numbers: torch.Tensor) -> None:
        decode_into(numbers.view(-1), part.view(-1), block)

    with ThreadPoolExecutor(threads := torch.get_num_threads()) as pool:
        parts = blocks.chunk(threads), target.chunk(threads)
        return _core_seconds(lambda: list(pool.map(decode, *parts))) / target.numel()


def _weights(how: RowFormat, rows: int, count: int) -> list[StoredRows]:
    """Some that lie one behind the other, of bytes that nobody wrote: kernels take as long for any."""
    numbers = torch.ones(count * rows * how.row_bytes, dtype=torch.uint8, device="cpu")
    scales = torch.ones(how.num_scales(rows), dtype=torch.float32, device="cpu")
    table = torch.zeros(16, dtype=torch.float32, device="cpu")
    return [StoredRows(how, rows, each, scales, table) for each in numbers.view(count, -1)]


def _typical(block: BlockType) -> tuple[BlockType, torch.Tensor]:
    """Blocks as trained weights have them, where their values decide what decoding takes, and their type."""
    count = DENSE_ELEMENTS // block.elements
    if block.name in LOSSLESS:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(count * block.elements, generator=generator, dtype=torch.float32, device="cpu").to(
            torch.bfloat16
        )
        if fitting := choose_block(numbers, block.elements, (block.name,)):  # else so small that they win nothing
            return fitting, encode(numbers, fitting)
    return block, torch.zeros(count * block.nbytes, dtype=torch.uint8, device="cpu")


def _core_seconds(work: Callable[[], object]) -> float:
    best = math.inf
    for run in range(RUNS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start) if run else best
    return best * torch.get_num_threads()
