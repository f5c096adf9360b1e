"""Calls of layers, and of parts of layers, that come from outside any call of the model.

Such a call takes the turn for as long as it lasts. Only hooks see it: the one before the call begins it, the one behind
ends it, also after an error. After an interrupt, which hooks do not see, the turn is free once the thread has left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from airstream.errors import UnsupportedError
from airstream.turns import Turns, is_running


@dataclass(slots=True)
class Direct:
    """The call that is under way, if there is one.

    Attributes:
        turns: whose turn it is.
        begin: takes the turn.
        module: what has been called. Only to be looked at by the thread that has the turn.
    """

    turns: Turns
    begin: Callable[[], None]
    module: nn.Module | None = None

    def start(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """`module` is called with `args`. Blocks until it may begin."""
        if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in args):
            raise UnsupportedError(
                "a streamed layer computes no gradients, its weights are gone afterwards: call it under "
                "torch.no_grad(), or with inputs that do not ask for a gradient"
            )
        self.begin()
        self.module = module

    def end(self) -> None:
        """It is over."""
        self.module = None
        self.turns.leave()


def is_in_a_module(thread: int) -> bool:
    """Whether `thread` is inside a call of any module."""
    return is_running(nn.Module._call_impl.__code__, thread)
