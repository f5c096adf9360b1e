"""This avoids one detail of the lm_head on the CPU that would cost copies of it in memory, and much time.

Small products tell, once, whether torch copies weights on this processor, and which way around that keeps the bits.

It knows one linear layer. It refuses to know models, and what accelerators do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from airstream.footprint.allocations import Allocations

PROBE_WIDTH, PROBE_VOCAB_SIZE = 256, 1024
"""Of the products that are looked at: large enough for the kernels that multiply large ones."""


class Way(Enum):
    """How what was sliced off several sequences goes through the lm_head, with the bits that transformers gives."""

    TOGETHER = "as in transformers; `copies_weights` says whether torch copies the weight for every sequence"
    IN_ROWS = "sequence by sequence, with ordinary strides: no weight is copied"
    IN_SLICES = "sequence by sequence, as it was sliced off: the weight is copied once"


class _Linear(nn.Linear):
    """A linear layer that takes the last positions of each sequence alone."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` has the shape (sequences, positions, width), or another."""
        if _asks(self.weight) or not _is_batched(hidden, self.bias is not None):
            return super().forward(hidden)
        results = sequence_by_sequence(hidden, self.weight, way_of(hidden.dtype))
        return results if self.bias is None else results.add_(self.bias)


def take_sequences_apart(head: nn.Module) -> Callable[[], None]:
    """Give `head`, a linear layer on the CPU, the last positions of each sequence alone; returns what undoes it.

    `generate` slices them off the hidden states, and the strides that are left send torch's products down a batched
    path. Where the processor has instructions for a half-precision type, that path copies the whole weight for every
    sequence: 2 GB each for a 70B model. Where torch does not copy, nothing is changed. By its class, because PEFT
    copies modules, and a method of the one in the other would compute with the wrong weight.
    """
    if type(head) is not nn.Linear or way_of(head.weight.dtype) is Way.TOGETHER:
        return lambda: None
    head.__class__ = _Linear
    return functools.partial(setattr, head, "__class__", nn.Linear)


@functools.cache
def way_of(dtype: torch.dtype) -> Way:
    """The way for weights of `dtype` that copies least, of those that keep the bits on this processor."""
    if not copies_weights(dtype):
        return Way.TOGETHER
    weight, hidden = _product(dtype)
    slices = [hidden[:, -kept:] for kept in (1, 3)]
    for way in (Way.IN_ROWS, Way.IN_SLICES):
        if all(torch.equal(sequence_by_sequence(each, weight, way), linear(each, weight)) for each in slices):
            return way
    return Way.TOGETHER


@functools.cache
def copies_weights(dtype: torch.dtype) -> bool:
    """Whether torch copies weights of `dtype` for what was sliced off several sequences: it allocates memory for it."""
    if dtype.itemsize == 1:  # what cannot be multiplied
        return False
    weight, hidden = _product(dtype)
    with _InsideProducts((weight, hidden)) as allocations:
        linear(hidden[:, -1:], weight)
    return allocations.peak_bytes >= weight.nbytes


def sequence_by_sequence(hidden: torch.Tensor, weight: torch.Tensor, way: Way) -> torch.Tensor:
    """`hidden` of shape (sequences, positions, width), each sequence alone times `weight`.

    No bias: torch adds it to a batched product after that was rounded, and to the product of one sequence before.
    """
    results = hidden.new_empty((*hidden.shape[:2], len(weight)))
    for number in range(len(hidden)):
        one = hidden[number : number + 1]
        if way is Way.IN_ROWS:
            one = one.clone(memory_format=torch.contiguous_format)
        results[number : number + 1] = linear(one, weight)
    return results


def _asks(weight: torch.Tensor) -> bool:
    """Whether torch itself sees that `weight` asks for a gradient: it multiplies slices as one matrix then."""
    return bool(torch.Tensor.requires_grad.__get__(weight))  # type: ignore[attr-defined]  # torch has it as an attribute


def _is_batched(hidden: torch.Tensor, has_bias: bool) -> bool:
    """Whether torch multiplies `hidden` batch by batch, for its strides, rather than as one matrix.

    With a bias torch asks first whether it is contiguous, which what was sliced off a single sequence is.
    """
    if hidden.dim() != 3 or (has_bias and hidden.is_contiguous()):
        return False
    return hidden.stride(0) != hidden.stride(1) * hidden.shape[1]


def _product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and hidden states of three sequences of five positions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(PROBE_VOCAB_SIZE, PROBE_WIDTH, generator=generator, dtype=torch.float32, device="cpu")
    hidden = torch.randn(3, 5, PROBE_WIDTH, generator=generator, dtype=torch.float32, device="cpu")
    return weight.to(dtype), hidden.to(dtype)


class _InsideProducts(Allocations):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Counts what batched products allocate inside, too: they are run where their own operations are seen again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        return super().__torch_dispatch__(func, types, args, kwargs)
