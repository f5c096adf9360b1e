"""This measures what products with weights as they are stored take on this machine.

It refuses to know how they are made, and what is planned with it.
"""

from __future__ import annotations

import functools
import math
import time

import torch

from airstream.codecs.decode import MEASURED_ELEMENTS, decoding_seconds
from airstream.codecs.lossless_blocks import LOSSLESS
from airstream.codecs.products import RowFormat, StoredRows, multiply

__all__ = ["product_seconds"]


@functools.cache
def product_seconds(how: RowFormat) -> float:
    """What one number of a weight and of one vector takes one core of this machine, while all are at it: two may
    be one that takes turns. Measured by the first call.
    """
    if how.block is not None and how.block.name in LOSSLESS:  # of zeros none is outside of the window
        dense = RowFormat("bf16", how.columns, 2 * how.columns)
        return product_seconds(dense) + decoding_seconds(how.block)
    rows = max(1, 2 * MEASURED_ELEMENTS // how.columns)
    weight = StoredRows(
        how,
        rows,
        torch.zeros(rows * how.row_bytes, dtype=torch.uint8),
        torch.zeros(rows * how.columns),
        torch.zeros(16),
    )
    vector, best = torch.zeros((1, how.columns)), math.inf
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        multiply(weight, vector)
        best = min(best, time.perf_counter() - start)
    return best * torch.get_num_threads() / (rows * how.columns)
