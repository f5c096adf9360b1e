"""This notices that somebody asks a streamed model for a gradient, which it cannot give.

No layer is kept for a backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from airstream.errors import UnsupportedError

NOT_CALLED_LABELS = ("start_positions", "end_positions", "return_loss")
"""Arguments that ask for a loss besides those that have "label" in their names."""


def refuse_gradients(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if a call of `module` asks for a loss, or has inputs, that a gradient is wanted of. Free under no_grad.

    Raises:
        UnsupportedError: with what to do for the loss alone, and for training.
    """
    if not torch.is_grad_enabled():
        return
    for name, value in _named(module, args, kwargs):
        asks_for_loss = ("label" in name or name in NOT_CALLED_LABELS) and value is not None and value is not False
        if asks_for_loss or (isinstance(value, torch.Tensor) and value.requires_grad):
            raise UnsupportedError(
                f"{name}= asks for {'a loss' if asks_for_loss else 'results'} with a gradient, and a streamed model "
                "computes none: no layer is kept for a backward pass. For the value alone, call it under "
                "torch.no_grad() or torch.inference_mode(); to train, load the checkpoint with transformers and PEFT"
            )


def _named(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    positional = zip(inspect.signature(module.forward).parameters, args, strict=False) if args else ()
    return [*positional, *kwargs.items()]
