"""This lets in calls of layers, and of parts of layers, that come from outside any call of the model.

Only hooks see such a call: the one before it takes the turn, the one behind it, which also runs after an error, gives
it back. After an interrupt, which hooks do not see, the turn is free once the thread has left the module.

It knows where a call comes from. It refuses to know what a layer needs to run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from types import FrameType

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from airstream.errors import UnsupportedError
from airstream.model.asking import Freezable
from airstream.model.gate import Gate
from airstream.model.hook import Hook
from airstream.model.refusals import refuse_tracing
from airstream.system.frames import is_on_stack

CALL = torch.nn.Module._call_impl.__code__
"""Where torch calls a module with its hooks."""


NO_GRADIENTS = (
    "a streamed layer computes no gradients, for its weights do not stay: call it under torch.no_grad(), or with "
    "inputs and adapters that do not ask for a gradient"
)


class Direct:
    """The call that is under way, if there is one. One for each gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._module: nn.Module | None = None
        self._frame: FrameType | None = None
        self._turn = 0

    @property
    def module(self) -> nn.Module | None:
        """What was called. An interrupt may have ended the call unseen: then the turn is another one by now."""
        return self._module if self._turn == self.turn else None

    @property
    def turn(self) -> int:
        """Which turn it is now."""
        return self._gate.turns.number

    @property
    def is_inside(self) -> bool:
        """Whether the calling thread is in a call already: of the model, or of a layer."""
        if self._module is not None:
            self._gate.turns.revoke_stale()
        return self._gate.turns.is_mine and (self._gate.is_computing or self.module is not None)

    def start(self, module: nn.Module) -> None:
        """`module` is called, which has got as far as its hooks. Blocks until it may begin."""
        frame = _call_of(module)
        self._gate.enter(partial(is_on_stack, frame))
        self._gate.asking.turn(not torch.is_grad_enabled())
        self._module, self._frame, self._turn = module, frame, self.turn

    def refuse_gradients(self, module: nn.Module, inputs: object) -> None:
        """Raise if a call of `module` from outside, with `inputs`, is to compute a gradient. Free under no_grad."""
        if not torch.is_grad_enabled():
            return
        own = (each for each in module.parameters() if not isinstance(each, Freezable))
        if any(isinstance(each, torch.Tensor) and each.requires_grad for each in (*tree_leaves(inputs), *own)):
            raise UnsupportedError(NO_GRADIENTS)

    def refuse_graph(self) -> None:
        """Raise if a hook has switched autograd on, which would record what weights that ask compute."""
        if torch.is_grad_enabled() and self._gate.asking.is_on:
            raise UnsupportedError(NO_GRADIENTS)

    def end(self) -> None:
        """It is over."""
        self._module = self._frame = None
        self._gate.asking.turn(False)
        self._gate.leave()


def take_turns(modules: Iterable[nn.Module], direct: Direct) -> Callable[[], None]:
    """Have `modules`, whose weights stay in place, take a turn when they are called alone; returns what undoes it."""

    def enter(called: nn.Module, *_: object) -> None:
        refuse_tracing()
        if not direct.is_inside:
            direct.start(called)

    def leave(called: nn.Module, *_: object) -> None:
        if direct.module is called:
            direct.end()

    undo = ExitStack()
    for module in modules:
        undo.callback(module.register_forward_pre_hook(Hook(enter), prepend=True).remove)
        undo.callback(module.register_forward_hook(Hook(leave), always_call=True).remove)
    return undo.close


def _call_of(module: nn.Module) -> FrameType:
    """The frame in which torch calls `module`, one of whose hooks is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not (frame.f_code is CALL and frame.f_locals.get("self") is module):
        frame = frame.f_back
    assert frame is not None, "hooks are run by calls"
    return frame


def refuse_when_closed(modules: Iterable[nn.Module], gate: Gate) -> None:
    """Let `modules`, which are about to lose their weights for good, say that the model is closed."""

    def check(*_: object) -> None:
        gate.check_open()

    for module in modules:
        module.register_forward_pre_hook(check, prepend=True)
