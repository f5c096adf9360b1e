"""One detail of the lm_head on the CPU that would cost a second copy of it in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def avoid_weight_copy(head: nn.Module) -> RemovableHandle:
    """Give `head` the last positions of a single sequence with ordinary strides.

    `generate` slices them off the hidden states, and the stride that is left on a dimension of size one sends torch's
    bfloat16 product on the CPU down a batched path, which copies the whole weight: 2 GB for a 70B model. The result is
    the same to the bit. For several sequences it would not be, so they are left alone, and the copies are in the plan.
    """

    def onto_plain_path(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if isinstance(hidden, torch.Tensor) and hidden.dim() == 3 and hidden.shape[0] == 1:
            return (hidden.clone(memory_format=torch.contiguous_format), *args[1:])
        return None

    return head.register_forward_pre_hook(onto_plain_path)
