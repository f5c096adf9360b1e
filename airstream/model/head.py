"""One detail of the lm_head on the CPU that would cost copies of it in memory, and much time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

COPYING = (torch.bfloat16, torch.float16)
"""Types in which torch multiplies what was sliced off longer sequences by a copy of the weight for each of them."""


def take_sequences_apart(head: nn.Module) -> Callable[[], None]:
    """Give `head`, a linear layer on the CPU, the last positions of each sequence alone; returns what undoes it.

    `generate` slices them off the hidden states, and the strides that are left send torch's half-precision products
    down a batched path, which copies the whole weight for every sequence: 2 GB each for a 70B model. Sequence by
    sequence the results are the same to the bit: in bfloat16 from a slice with ordinary strides, for which nothing is
    copied; in float16 from the slice as it is, so that one copy is the most there is.
    """
    forward = head.forward

    def separately(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_copying(head, hidden):
            return forward(hidden, *args, **kwargs)

        def compute(one: torch.Tensor) -> torch.Tensor:
            is_exact = (
                one.dtype == torch.bfloat16
            )  # in float16 it is another kernel, where there are instructions for it
            return forward(one.clone(memory_format=torch.contiguous_format) if is_exact else one, *args, **kwargs)

        first = compute(hidden[:1])
        results = first.new_empty((len(hidden), *first.shape[1:]))
        results[:1] = first
        for number in range(1, len(hidden)):
            results[number : number + 1] = compute(hidden[number : number + 1])
        return results

    head.forward = separately
    return partial(head.__dict__.pop, "forward", None)


def _is_copying(head: nn.Module, hidden: Any) -> bool:
    """Whether `hidden` (sequences, positions, width) is a slice that torch would copy weights for."""
    return (
        type(head) is nn.Linear
        and isinstance(hidden, torch.Tensor)
        and hidden.dim() == 3
        and hidden.dtype in COPYING
        and hidden.stride(0) != hidden.shape[1] * hidden.shape[2]
    )
