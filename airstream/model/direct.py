"""This lets in calls of layers, and of parts of layers, that come from outside any call of the model.

Only hooks see such a call: the one before it takes the turn, the one behind it, which also runs after an error, gives
it back. After an interrupt, which hooks do not see, the turn is free once the thread has left the module.

It knows where a call comes from. It refuses to know what a layer needs to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import nn

from airstream.errors import UnsupportedError
from airstream.model.gate import Gate
from airstream.model.hook import Hook


class Direct:
    """The call that is under way, if there is one. Only the thread that has the turn may look at it."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._module: nn.Module | None = None
        self._turn = 0

    @property
    def module(self) -> nn.Module | None:
        """What was called. An interrupt may have ended the call unseen: then the turn is another one by now."""
        return self._module if self._turn == self.turn else None

    @property
    def turn(self) -> int:
        """Which turn it is now."""
        return self._gate.turns.number

    def was_interrupted(self) -> bool:
        """Whether the last call ended unseen, in an earlier turn. Says so once."""
        is_left = self._module is not None and self.module is None
        if is_left:
            self._module = None
        return is_left

    @property
    def is_inside(self) -> bool:
        """Whether the calling thread is in a call already: of the model, or of a layer."""
        return self._gate.turns.is_mine

    def start(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """`module` is called with `args`. Blocks until it may begin."""
        if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in args):
            raise UnsupportedError(
                "a streamed layer computes no gradients, for its weights do not stay: call it under torch.no_grad(), "
                "or with inputs that do not ask for a gradient"
            )
        self._gate.enter()
        self._gate.asking.turn(not torch.is_grad_enabled())
        self._module, self._turn = module, self.turn

    def end(self) -> None:
        """It is over."""
        self._module = None
        self._gate.asking.turn(False)
        self._gate.leave()


def take_turns(modules: Iterable[nn.Module], gate: Gate) -> Callable[[], None]:
    """Have `modules`, whose weights stay in place, take a turn when they are called alone; returns what undoes it."""
    direct = Direct(gate)

    def enter(called: nn.Module, *_: object) -> None:
        if not direct.is_inside:
            direct.start(called, ())

    def leave(called: nn.Module, *_: object) -> None:
        if direct.module is called:
            direct.end()

    undo = ExitStack()
    for module in modules:
        undo.callback(module.register_forward_pre_hook(Hook(enter), prepend=True).remove)
        undo.callback(module.register_forward_hook(Hook(leave), always_call=True).remove)
    return undo.close


def refuse_when_closed(modules: Iterable[nn.Module], gate: Gate) -> None:
    """Let `modules`, which are about to lose their weights for good, say that the model is closed."""

    def check(*_: object) -> None:
        gate.check_open()

    for module in modules:
        module.register_forward_pre_hook(check, prepend=True)
