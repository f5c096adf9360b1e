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

OBJECTS = ("nf4", "int8")
"""Kinds of rows that another package's object holds where kernels are exact, which cannot be copied either."""


class InPackedRows(Stored):
    """The values of a weight `name`, of which there are only packed ones, as `module` has them."""

    is_packed = True

    def __init__(self, name: str, module: PackedLinear) -> None:
        self.name = name
        self._stored_as = module.stored_as
        self._is_object = module.row_format is not None and module.row_format.kind in OBJECTS

    def read(self) -> NoReturn:
        remedy = "load the model without kernels=: there weight.clone() reads them"
        if self._is_object:
            remedy = f"safetensors.safe_open reads the packed ones ({self._stored_as})"
        raise UnsupportedError(
            f'{self.name!r} stays packed in memory (kernels="fast"): its module multiplies with it so, and it has no '
            f"values that could be read or copied. Call the module for a product. For the values, {remedy}"
        )

    def rows(self, numbers: Sequence[int]) -> NoReturn:  # noqa: ARG002 - whichever they are
        self.read()

    def has(self, values: torch.Tensor) -> bool:  # noqa: ARG002 - as `rows`
        return False


def stand_in_for_packed(model: nn.Module, device: torch.device) -> None:
    """Let the `weight` of modules whose weights are packed say what it is, and refuse what takes its values."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.row_format is not None:
            stored = InPackedRows(f"{name}.weight", module)
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
