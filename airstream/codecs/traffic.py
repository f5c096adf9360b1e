"""This counts what decoding costs an accelerator: the bytes of its own memory that torch's operations read and write.

Each operation takes its bytes over the bandwidth of that memory. They run here on the meta device: no accelerator is
needed. It refuses to know bandwidths, and what the CPU takes: `rates.decoding_seconds` has that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from airstream.codecs.block_types import HOST_ONLY, BlockType
from airstream.codecs.decode import DEVICE_SLICE_ELEMENTS, decode_with_torch


@functools.cache
def decoding_traffic(block: BlockType, dtype: torch.dtype) -> float:
    """Bytes of memory that a device passes over to make one number of `dtype` out of blocks of type `block`.

    0 for types that no device decodes: the CPU does.
    """
    if block.name in HOST_ONLY:
        return 0.0
    count = DEVICE_SLICE_ELEMENTS // block.elements
    raw = torch.empty(count * block.nbytes, dtype=torch.uint8, device="meta")
    numbers = torch.empty(count * block.elements, dtype=dtype, device="meta")
    with _Traffic() as traffic:
        decode_with_torch(numbers, raw, block)
    return traffic.nbytes / numbers.numel()


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Counts, in `nbytes`, what operations read and write while it is entered. Views do neither."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = args[1:] if func is torch.ops.aten.copy_.default else args
        tensors = [each for each in tree_leaves((read, kwargs)) if isinstance(each, torch.Tensor)]
        if tensors and not func.is_view:
            written = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            self.nbytes += sum(each.nbytes for each in (*tensors, *written))
        return result
