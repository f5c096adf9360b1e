"""This multiplies weights with vectors as they are stored: rows are unpacked where they are needed, in caches.

So a product moves no more bytes than are stored. It sums up in float32 what was never rounded to a narrower dtype: as
close to the exact product as torch's own or closer, and not to the bit the same. It runs on a CPU, by products.c, on as
many threads as torch. It knows how numbers lie in rows. It refuses to know models.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from airstream.codecs.block_types import BlockType
from airstream.codecs.library import has_kernels
from airstream.codecs.lossless_blocks import LOSSLESS
from airstream.codecs.products_native import NativeRows, decoder_of
from airstream.errors import CheckpointError

__all__ = [
    "FEW",
    "PANEL_BYTES",
    "STEP",
    "RowFormat",
    "StoredRows",
    "format_of_blocks",
    "make_dense",
    "multiply",
    "panel_dtype",
]

FEW = 8
"""So many vectors are multiplied row by row. For more, rows are made dense, some at a time, for torch's own product."""

PANEL_BYTES = 4 << 20
"""Of rows that are made dense at a time."""

GROUPED = ("int8", "int4", "nf4", "fp8")
"""Kernels of numbers that share scales."""

STEP = 32
"""Numbers that they unpack at a time: a group is a multiple."""

MAX_COLUMNS = 1 << 18
"""Numbers of a row, which has to stay in a core's cache: more than any model's."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of a weight are stored.

    Attributes:
        kind: the kernel: "blocks", "lossless", "bf16", "int8", "int4", "nf4" or "fp8".
        columns: numbers of a row.
        row_bytes: bytes of a row, without its scales.
        group: numbers of a block, or those that share a scale.
        block: what blocks they are, if they are.
    """

    kind: str
    columns: int
    row_bytes: int
    group: int = 1
    block: BlockType | None = None

    def num_scales(self, rows: int) -> int:
        """How many scales `rows` of numbers have that share them."""
        return (-(-rows // self.group) if self.kind == "fp8" else rows) * (self.columns // self.group)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A weight (rows, columns), as it is stored, on the CPU.

    Attributes:
        numbers: contiguous, `rows * format.row_bytes` bytes in any dtype.
        scales: contiguous, in float32 or bfloat16, if the format has any: (rows, columns / group) of
            "int8", "int4" and "nf4"; (rows / group, columns / group) of "fp8".
        table: the sixteen numbers that "nf4" chooses from, in float32.
        name: for messages.
    """

    format: RowFormat
    rows: int
    numbers: torch.Tensor
    scales: torch.Tensor | None = None
    table: torch.Tensor | None = None
    name: str = "a weight"

    def native(self) -> NativeRows:
        """The same for kernels.

        Raises:
            ValueError: sizes do not go together, which C would not notice.
        """
        how, scales, table = self.format, self.scales, self.table
        if self.numbers.nbytes != self.rows * how.row_bytes or not self.numbers.is_contiguous():
            raise ValueError(f"rows ({self.rows}) of {how.row_bytes} B are not {self.numbers.nbytes} B")
        if how.kind in GROUPED and (how.group % STEP or how.columns % how.group):
            raise ValueError(f"groups of {how.group} in rows of {how.columns} are no multiples of {STEP}")
        if how.kind in GROUPED and (scales is None or scales.numel() != how.num_scales(self.rows)):
            raise ValueError(f"rows ({self.rows}) of {how} have {how.num_scales(self.rows)} scales")
        if how.kind == "nf4" and (table is None or (table.numel(), table.dtype) != (16, torch.float32)):
            raise ValueError("the table of nf4 is sixteen numbers in float32")
        if any(
            not each.is_cpu or not each.is_contiguous() for each in (self.numbers, scales, table) if each is not None
        ):
            raise ValueError("kernels read contiguous memory of the host")
        slots = LOSSLESS[how.block.name].slots(how.block) if how.block and how.block.name in LOSSLESS else 0
        sizes = (how.columns, how.row_bytes, how.group, slots)
        return NativeRows(how.kind, sizes, self.numbers, self.scales, self.table, how.block)


def format_of_blocks(block: BlockType, columns: int) -> RowFormat | None:
    """How rows of blocks are multiplied; None if there is no kernel, or rows are not whole blocks."""
    if not has_kernels() or columns % block.elements or columns > MAX_COLUMNS or decoder_of(block) is None:
        return None
    kind = "lossless" if block.name in LOSSLESS else "blocks"
    return RowFormat(kind, columns, columns // block.elements * block.nbytes, block.elements, block)


def multiply(weight: StoredRows, vectors: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`vectors` (count, columns) times the transposed `weight`, and `bias` (rows,): (count, rows), rounded once.

    On the meta device it allocates as much as on the CPU.

    Raises:
        CheckpointError: a lossless block is damaged.
    """
    if len(vectors) > FEW:
        return _multiply_panels(weight, vectors, bias)
    wide = vectors.float().contiguous()
    out = torch.empty((len(wide), weight.rows), dtype=torch.float32, device=vectors.device)
    if not out.is_meta:
        _check_whole(weight, weight.native().multiply(weight.rows, wide, out), weight.rows)
    if bias is not None:
        out += bias
    return out.to(vectors.dtype)


def make_dense(weight: StoredRows, first: int, out: torch.Tensor) -> None:
    """Write the rows of `weight` from `first` on to `out` (some, columns), in float32 or bfloat16.

    On the meta device it allocates as much as on the CPU, where every thread has room for two rows.

    Raises:
        CheckpointError: a lossless block is damaged.
    """
    if out.is_meta:
        torch.empty((torch.get_num_threads(), 2 * weight.format.columns), device="meta", dtype=torch.float32)
        return
    _check_whole(weight, weight.native().make_dense(first, out), len(out), first)


def _multiply_panels(weight: StoredRows, vectors: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """For many vectors: some rows are made dense at a time, in the dtype that torch multiplies fastest."""
    dtype, columns = panel_dtype(vectors.dtype), weight.format.columns
    factors = vectors.to(dtype)
    step = max(1, min(weight.rows, PANEL_BYTES // (columns * dtype.itemsize)))
    panel = torch.empty((step, columns), dtype=dtype, device=vectors.device)
    out = torch.empty((len(vectors), weight.rows), dtype=vectors.dtype, device=vectors.device)
    for first in range(0, step if out.is_meta else weight.rows, step):  # all take the same memory
        dense = panel[: min(step, weight.rows - first)]
        make_dense(weight, first, dense)
        some = slice(first, first + len(dense))
        out[:, some] = linear(factors, dense, None if bias is None else bias[some].to(dtype))
    return out


def _check_whole(weight: StoredRows, done: int, rows: int, first: int = 0) -> None:
    if done < rows:
        raise CheckpointError(
            f"a block of {weight.format.block.name if weight.format.block else weight.format.kind} in row "
            f"{first + done:,} of {weight.name} is damaged. Get the file again, or pack it anew"
        )


@functools.cache
def panel_dtype(dtype: torch.dtype) -> torch.dtype:
    """What torch multiplies fastest of `dtype` and float32 on this processor. Measured by the first call."""
    if dtype != torch.bfloat16:
        return torch.float32  # what kernels write besides
    seconds = {}
    for candidate in (torch.float32, dtype):
        some = torch.ones((256, 1024), dtype=candidate, device="cpu")
        torch.mm(some, some.t())  # which compiles a kernel, perhaps
        start = time.perf_counter()
        torch.mm(some, some.t())
        seconds[candidate] = time.perf_counter() - start
    return min(seconds, key=lambda each: seconds[each])
