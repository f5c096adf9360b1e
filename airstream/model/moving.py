"""This refuses to move or cast a model or a part of it. `nn.Module` does that by a function for each of its tensors.

It knows whether that would change anything, and how tensors refuse it. It refuses to know models: a part is a plain
module, and only the tensors in it are ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from airstream.model.refusals import refuse

Kind = TypeVar("Kind", bound=torch.Tensor)

CONVERSIONS = ("to", "type", "double", "float", "half", "bfloat16", "cpu", "cuda", "xpu")
"""What modules call of their tensors when they are moved or cast."""

MOVE = (
    "load it with from_pretrained(..., device=..., dtype=...) instead. A pipeline takes "
    "device=model.device, where inputs belong as well"
)


def changes_nothing(fn: Callable[[torch.Tensor], torch.Tensor], tensors: Iterable[torch.Tensor]) -> bool:
    """Whether `fn`, which a module applies to its tensors, leaves `tensors` as they are. It sees empty ones."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    return all(_leaves(fn, torch.empty(0, dtype=dtype, device=device)) for dtype, device in kinds)


def _leaves(fn: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> bool:
    was_shared = torch.Tensor.is_shared(sample)  # type: ignore[no-untyped-call]
    try:
        is_left = fn(sample) is sample and sample._version == 0
        return is_left and torch.Tensor.is_shared(sample) == was_shared  # type: ignore[no-untyped-call]
    except (AssertionError, NotImplementedError, RuntimeError):  # a device that this torch does not have
        return False


def refuse_moving() -> NoReturn:
    """Raise because somebody moves or casts what is streamed."""
    refuse("moving or casting", MOVE)


def unmoved(cls: type[Kind]) -> type[Kind]:
    """Have tensors of class `cls` refuse to be moved or cast by the module that they are in.

    Whoever wants a copy on another device, or of another type, still gets it: only what modules do is refused. They
    would keep it where the weight stays in memory, and lose it where it does not.
    """
    for name in CONVERSIONS:
        setattr(cls, name, _refusing(getattr(torch.Tensor, name)))
    return cls


def _refusing(convert: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _is_applied():
            return convert(self, *args, **kwargs)
        if not changes_nothing(lambda sample: convert(sample, *args, **kwargs), [self]):
            refuse_moving()
        return self

    return method


def _is_applied() -> bool:
    """Whether a module is moving or casting its tensors now, on this thread, but not in the middle of a pass.

    There it is the model's own code, as that of routers which compute in float32: it does so in every pass.
    """
    frame: FrameType | None = sys._getframe(2)
    is_applied = False
    while frame is not None and frame.f_code is not torch.nn.Module._call_impl.__code__:
        is_applied |= frame.f_code is nn.Module._apply.__code__
        frame = frame.f_back
    return is_applied and frame is None
