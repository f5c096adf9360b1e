"""This measures what it takes on this machine to multiply with weights as they are stored, or to make them dense.

It refuses to know how that is done, and what is planned with it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch

from airstream.codecs.decode import MEASURED_ELEMENTS, decoding_seconds
from airstream.codecs.lossless_blocks import LOSSLESS
from airstream.codecs.products import RowFormat, StoredRows, make_dense, multiply

__all__ = ["dense_seconds", "product_seconds"]


@functools.cache
def product_seconds(how: RowFormat) -> float:
    """What one number of a weight and of one vector takes one core of this machine, while all are at it: two may
    be one that takes turns. Measured by the first call.
    """
    if how.block is not None and how.block.name in LOSSLESS:  # of zeros none is outside of the window
        dense = RowFormat("bf16", how.columns, 2 * how.columns)
        return product_seconds(dense) + decoding_seconds(how.block)
    weight, vector = _zeros(how), torch.zeros((1, how.columns), dtype=torch.float32, device="cpu")
    return _core_seconds(lambda: multiply(weight, vector)) / (weight.rows * how.columns)


@functools.cache
def dense_seconds(kind: str) -> float:
    """What it takes one core, as above, to write a number of `kind`, "fp8" or "int4", to memory in bfloat16."""
    columns = 4096
    weight = _zeros(RowFormat(kind, columns, columns // (2 if kind == "int4" else 1), 128))
    out = torch.empty((weight.rows, columns), dtype=torch.bfloat16, device="cpu")
    return _core_seconds(lambda: make_dense(weight, 0, out)) / out.numel()


def _zeros(how: RowFormat) -> StoredRows:
    rows = max(1, 2 * MEASURED_ELEMENTS // how.columns)
    numbers = torch.zeros(rows * how.row_bytes, dtype=torch.uint8, device="cpu")
    return StoredRows(
        how,
        rows,
        numbers,
        torch.zeros(how.num_scales(rows), dtype=torch.float32, device="cpu"),
        torch.zeros(16, dtype=torch.float32, device="cpu"),
    )


def _core_seconds(work: Callable[[], object]) -> float:
    best = math.inf
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best * torch.get_num_threads()
