"""One detail of the lm_head on the CPU that would cost copies of it in memory, and much time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

COPYING = (torch.bfloat16, torch.float16)
"""Types in which torch multiplies what was sliced off longer sequences by a copy of the weight for each of them."""


class _Linear(nn.Linear):
    """A linear layer that takes the last positions of each sequence alone."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` has the shape (sequences, positions, width), or another."""
        if not _is_copying(hidden):
            return super().forward(hidden)
        results = hidden.new_empty((*hidden.shape[:2], self.out_features))
        for number in range(len(hidden)):
            one = hidden[number : number + 1]
            if one.dtype == torch.bfloat16:  # in float16 this is another kernel, where there are instructions for it
                one = one.clone(memory_format=torch.contiguous_format)
            results[number : number + 1] = super().forward(one)
        return results


def take_sequences_apart(head: nn.Module) -> Callable[[], None]:
    """Give `head`, a linear layer on the CPU, the last positions of each sequence alone; returns what undoes it.

    `generate` slices them off the hidden states, and the strides that are left send torch's half-precision products
    down a batched path, which copies the whole weight for every sequence: 2 GB each for a 70B model. Sequence by
    sequence the results are the same to the bit: in bfloat16 from a slice with ordinary strides, for which nothing is
    copied; in float16 from the slice as it is, so that one copy is the most there is. By its class, because PEFT copies
    modules, and a method of the one in the other would compute with the wrong weight.
    """
    if type(head) is not nn.Linear:
        return lambda: None
    head.__class__ = _Linear
    return partial(setattr, head, "__class__", nn.Linear)


def _is_copying(hidden: torch.Tensor) -> bool:
    """Whether `hidden` is a slice that torch would copy weights for."""
    return hidden.dim() == 3 and hidden.dtype in COPYING and hidden.stride(0) != hidden.shape[1] * hidden.shape[2]
