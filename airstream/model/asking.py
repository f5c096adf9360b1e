"""While the model computes, a weight has `requires_grad=True` wherever that of transformers would.

torch looks at that even where no gradient is computed: a batch whose sequences do not lie side by side, such as the
last position of each, is multiplied as one matrix by a weight that asks for a gradient, and sequence by sequence by one
that does not. The two round differently, and the second may copy the weight for every sequence.

Between calls no weight asks, so that no arithmetic of the caller's with it is recorded. It knows weights that are in
place, and which of them somebody has frozen. It refuses to know modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from airstream.model.stored import Stored
from airstream.model.weight_refusals import refuse_gradient

_set: Callable[[Any, bool], None] = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]
"""Past what `Freezable` says: torch has it as an attribute."""


class Freezable:
    """A tensor that stands for the weight that is `stored`, and says of gradients what transformers' parameters say.

    That it needs none can be said, as of them. It never has one, and what is frozen stays so.
    """

    stored: Stored
    _is_param: bool

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze it, under all its names, or leave it as it is. UnsupportedError if it is frozen and asked to ask."""
        if requires_grad == self.requires_grad:
            return self
        if requires_grad:
            refuse_gradient(self.stored.name)
        self.stored.is_frozen = True
        _set(self, False)  # it may be in place at this moment
        return self

    @property
    def requires_grad(self) -> bool:
        """Whether it is not frozen. torch itself sees that only while the model computes."""
        return may_ask(self, self._is_param) and not self.stored.is_frozen

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def grad(self) -> None:
        """None, and it stays so: optimizers would follow it, and what fused ones write is not counted."""

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:
            refuse_gradient(self.stored.name)


Askers = Sequence[tuple[torch.Tensor, Stored]]
"""Parameters that may ask for a gradient, and what they have the values of."""


class Asking:
    """The weights in place of one model.

    Attributes:
        is_on: they ask.
    """

    def __init__(self) -> None:
        self._in_place: dict[int, Askers] = {}
        self._is_told = True  # what `is_on` says, to all of them: an interrupt may come when some have been
        self.is_on = False

    def add(self, weights: Askers) -> None:
        """`weights` are in place from now on."""
        self._in_place[id(weights)] = weights
        if self.is_on:
            _ask(weights)

    def remove(self, weights: Askers) -> None:
        """They are not any more. Those that never were are nothing to it."""
        if id(weights) in self._in_place:
            if self.is_on or not self._is_told:
                _be_silent(weights)
            self._in_place.pop(id(weights), None)

    def turn(self, is_on: bool) -> bool:
        """Let the weights ask from now on, or not. Gives how it was before.

        Under autocast a weight that is cast first does not ask: neither does what torch makes of it without gradients,
        and torch would keep that for as long as autocast lasts.
        """
        was_on = self.is_on
        if was_on is not is_on or not self._is_told:
            self._is_told, self.is_on = False, is_on
            for weights in self._in_place.values():
                (_ask if is_on else _be_silent)(weights)
            self._is_told = True
        return was_on


def may_ask(weight: Any, is_parameter: bool) -> bool:
    """Whether transformers would let it ask for a gradient: a parameter that has numbers, not codes."""
    return is_parameter and bool(weight.is_floating_point())


def _ask(weights: Askers) -> None:
    casts = bool(weights) and torch.is_autocast_enabled(weights[0][0].device.type)
    for weight, stored in weights:
        if not stored.is_frozen and not (casts and weight.dtype is torch.float32):
            _set(weight, True)


def _be_silent(weights: Askers) -> None:
    for weight, _ in weights:
        _set(weight, False)
