"""This says which weights in 4 bits bitsandbytes can compute with on a CPU, and lets it, where it can.

bitsandbytes cuts a weight in blocks that share a scale, one behind the other, whichever rows they are in. Its kernels
for a CPU take every row to be whole blocks: of others they make other numbers, or fail. Where a processor has
instructions for bfloat16 it packs weights anew, by 32 rows; others it can make dense.

It knows modules of bitsandbytes. It refuses to know where weights lie.
"""

from __future__ import annotations

from torch import nn

from airstream.checkpoint.stored import StoredTensor
from airstream.compat.assembled import is_packed_alone
from airstream.compat.packed_shapes import Index
from airstream.errors import CheckpointError, UnsupportedError

__all__ = ["NF4_BLOCK", "ROWS_PACKED_ANEW", "settle_four_bits"]

NF4_BLOCK = 64
"""Numbers that share a scale, unless a checkpoint says otherwise."""

ROWS_PACKED_ANEW = 32


def settle_four_bits(model: nn.Module, index: Index) -> None:
    """Let modules of `model` whose rows cannot be packed anew be computed with as on other processors.

    Args:
        index: the checkpoint that their weights are in.

    Raises:
        CheckpointError: a weight has another number of numbers.
        UnsupportedError: a row is no whole blocks; the message names the tensor.
    """
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or not is_packed_alone(weight):
            continue
        rows, columns = int(module.out_features), int(module.in_features)
        scales = index.get(f"{name}.weight.absmax")
        numbers = index.get(f"{name}.weight")
        if scales is not None and numbers is not None and numbers.nbytes != -(-rows * columns // 2):
            raise CheckpointError(
                f"{numbers.file}: tensor {numbers.name!r} {list(numbers.shape)} has {2 * numbers.nbytes} numbers of 4 "
                f"bits, the model needs {rows} x {columns}: it is damaged, or of another model. Download it again"
            )
        block = _block(rows * columns, scales)
        if columns % block:
            where = f"{scales.file}: " if scales is not None else ""
            raise UnsupportedError(
                f"{where}tensor '{name}.weight' [{rows}, {columns}] is packed in 4 bits by bitsandbytes, whose kernels "
                f"for a CPU need columns that are a multiple of {block}, the numbers that share a scale: load it on "
                "a GPU, or pack the model that it was made of in 8 bits, with "
                'compression="int8"'
            )
        if rows % ROWS_PACKED_ANEW:
            module.support_avx512bf16_for_cpu = False


def _block(numbers: int, scales: StoredTensor | None) -> int:
    """How many of `numbers` share a scale. The last of them may be fewer."""
    if scales is None or not scales.shape or not scales.shape[0]:
        return NF4_BLOCK
    return max(-(-numbers // scales.shape[0]), 1)
