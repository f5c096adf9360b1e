"""A weight that stays packed is a parameter of bytes: this is what stands where its values used to be.

It has the shape and the dtype of the weight, for whatever looks at them, and counts as so many parameters. It refuses
to know how its module multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from airstream.compat.packed_linear import PackedLinear
from airstream.errors import UnsupportedError
from airstream.model.absent import Absent
from airstream.model.stored import Stored


class InPackedRows(Stored):
    """The values of a weight `name`, of which there are only packed ones."""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self) -> NoReturn:
        raise UnsupportedError(
            f'{self.name!r} stays packed in memory (kernels="fast"), and its module multiplies with it so: it cannot '
            "be copied. Load the model without kernels= for its values"
        )

    def rows(self, numbers: Sequence[int]) -> NoReturn:  # noqa: ARG002 - whichever they are
        self.read()

    def has(self, values: torch.Tensor) -> bool:  # noqa: ARG002 - as `rows`
        return False


def stand_in_for_packed(model: nn.Module, device: torch.device) -> None:
    """Let the `weight` of modules whose weights are packed say what it is, and refuse what takes its values."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.row_format is not None:
            stored = InPackedRows(f"{name}.weight")
            module.__dict__["weight"] = Absent.in_place_of(module.weight, stored, device, is_parameter=True)


class CountsPacked:
    """What a streamed model counts."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As in transformers. A packed weight counts as the numbers that it holds, not as its bytes."""
        parent: Any = super()
        count: int = parent.num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        modules = self.modules()  # type: ignore[attr-defined]  # of the model's class
        return count + sum(module.hidden_numbers for module in modules if isinstance(module, PackedLinear))
