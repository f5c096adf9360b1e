"""A weight in memory is a view of the engine's memory, which must notice when somebody writes to it.

torch counts the changes in place of every tensor (`_version`), those through its views and detached twins as well. Each
weight has a count of its own, though all of a slab share their memory: reads that fill the slab do not count. `.data`,
by which torch steps around the count, is a twin here, and cannot be set. It costs nothing while the model computes.

Weights whose memory is lent share one count with the others of their unit. It says whether somebody wrote to the
memory when it held others already, and has torch refuse a graph that was recorded with it.

It knows whether it was written to. It refuses to know what follows from that: `Binding` asks, and refuses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from airstream.model.asking import Freezable
from airstream.model.moving import unmoved
from airstream.model.stored import Stored
from airstream.model.weight_refusals import refuse_change, refuse_remaking, refuse_storage


@unmoved
class Weight(Freezable, torch.Tensor):  # type: ignore[misc]  # torch has grad as an attribute
    """A view of memory that holds the values of `stored`.

    Attributes:
        accepted: the changes in place that have left the checkpoint's values.
        is_lent: the memory is going to hold other weights. A copy of this one is read from the checkpoint, whenever it
            is made and by whichever thread.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as nn.Parameter has it
    stored: Stored
    accepted: int
    is_lent = False
    _is_param = False  # what `isinstance(..., nn.Parameter)` looks for

    @staticmethod
    def __new__(cls, *_: Any, **__: Any) -> Weight:
        refuse_remaking()

    @property
    def is_touched(self) -> bool:
        """Whether it has been written to since its values were last known to be the checkpoint's."""
        return self._version != self.accepted

    def detach(self) -> Weight:
        return _make(torch.Tensor._make_subclass(Weight, super().detach()), self.stored, False, self.is_lent)

    def clone(self, *, memory_format: torch.memory_format | None = torch.preserve_format) -> torch.Tensor:
        if self.is_lent:
            return self.stored.read().to(self.dtype, memory_format=memory_format)
        return super().clone(memory_format=memory_format)

    @property
    def data(self) -> Weight:
        """A twin of the weight: it shares the memory and the count of changes."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """The same values alone: some layers cast their weights when they first compute.

        `weight.data += 1` comes here when it has written already: then it is no longer the weight that counts.
        """
        if self.is_touched and not self.stored.has(self):
            refuse_change(self.stored.name)
        if value.shape != self.shape or not torch.equal(value, self.to(value.dtype)):
            refuse_change(self.stored.name)
        _set_data(self, value)
        self.accepted = self._version

    def untyped_storage(self) -> NoReturn:
        refuse_storage(self.stored.name)

    def storage(self) -> NoReturn:
        refuse_storage(self.stored.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._plain(self.clone())
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, it is an ordinary tensor, without its neighbours in memory."""
        return self._plain(self.clone()).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _plain(self, values: torch.Tensor) -> torch.Tensor:
        return nn.Parameter(values, self.requires_grad) if self._is_param else values


def weight_of(view: torch.Tensor, stored: Stored, is_parameter: bool, is_lent: bool) -> torch.Tensor:
    """`view` as a weight that counts its own changes, and, if it is lent, those of all views of that memory.

    A device whose tensors have a class of their own keeps that.
    """
    if type(view) is not torch.Tensor:
        return nn.Parameter(view, requires_grad=False) if is_parameter else view
    base = view.detach() if is_lent else view.data
    return _make(torch.Tensor._make_subclass(Weight, base), stored, is_parameter, is_lent)


class Loan:
    """The memory that is lent to weights of one unit, which are views of `memory` and share its count of changes.

    Whoever keeps a weight when the loan is over finds no numbers, not others. Whoever keeps a view of one can still
    write to the memory, which holds others then: that is noticed. A graph that was recorded with it raises.
    """

    __slots__ = ("_at_rest", "_is_lent", "_lent", "_memory", "_was_changed", "_weights")

    def __init__(self, memory: torch.Tensor, weights: Sequence[Weight]) -> None:
        self._memory = memory
        self._weights = weights
        self._lent = [(weight, weight.detach(), _blank(weight)) for weight in weights if _can_be_blank(weight)]
        self._at_rest: int | None = None  # the changes until the last loan was over; while it lasts, they are judged
        self._is_lent = self._was_changed = False

    def begin(self) -> None:
        """The memory holds the values of the weights now."""
        self._was_changed = self.was_changed
        version = self._memory._version
        for weight in self._weights:
            weight.accepted = version
        self._at_rest, self._is_lent = None, True  # an interrupt may come anywhere: what is compared is set before
        for weight, view, _ in self._lent:
            _set_data(weight, view)

    def end(self) -> None:
        """It is going to hold others."""
        if self._is_lent and self._memory._version != getattr(self._weights[0], "accepted", None):
            self._was_changed = True  # nobody may have judged that
        self._is_lent, self._at_rest = False, None
        torch.autograd.graph.increment_version(self._memory)
        self._at_rest = self._memory._version
        for weight, _, blank in self._lent:
            _set_data(weight, blank)

    @property
    def was_changed(self) -> bool:
        """Whether somebody has written to the memory when it was not lent any more."""
        return self._was_changed or (self._at_rest is not None and self._memory._version != self._at_rest)

    def renew(self) -> None:
        """What was changed has been forgotten: the memory is filled anew."""
        self._was_changed = False
        self._at_rest = None if self._at_rest is None else self._memory._version
        for weight, _, _ in self._lent:
            _nan(weight.dtype, weight.device).fill_(torch.nan)


def _blank(weight: torch.Tensor) -> torch.Tensor:
    return _nan(weight.dtype, weight.device).expand(weight.shape)


@functools.cache
def _nan(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device)


def _can_be_blank(weight: torch.Tensor) -> bool:
    """Whether there is a value of its type that is no number."""
    return weight.is_floating_point() and weight.dtype.itemsize > 1


_set_data: Callable[[torch.Tensor, torch.Tensor], None] = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _make(weight: Any, stored: Stored, is_parameter: bool, is_lent: bool) -> Weight:
    weight.stored, weight._is_param, weight.is_lent, weight.accepted = stored, is_parameter, is_lent, weight._version
    return weight
