"""A codec of quantised weights is a row of a table: what it makes of a weight. `quantising` has those that have a name.

It refuses to know any format.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from airstream.errors import UnsupportedError
from airstream.system.importing import quiet_imports

__all__ = ["SCALES", "QuantCodec", "Tensors", "check_package"]

Tensors = dict[str, torch.Tensor]
"""By what their names end with: what follows the name of the module."""

SCALES = "weight.absmax"
"""The end of the name of bitsandbytes' scales."""


@dataclass(frozen=True, slots=True)
class QuantCodec:
    """One format of quantised weights.

    Attributes:
        module: what is imported to quantise, and to load the result; None if transformers alone does both.
        missing: what to type if it is not there; accelerate, which transformers asks for besides, comes with it.
        skipped: the field of its settings that lists modules which stay as they are.
        settings: what `config.json` says, for a model that computes in a dtype.
        of_rows: what some rows, become, by the ends of their names. What all rows become is that,
            one behind the other.
        of_weight: what belongs to the whole weight.
        attributes: what the header of a file says of the whole weight, under the model's name for it.
        fits: whether a weight of a shape can be quantised.
        takes: the same in words.
        lists_all: whether its settings have to list every module that stays as it is.
        takes_experts: whether transformers loads experts of it, which are one tensor in the model.
        of_scales: what all numbers that rows become under `SCALES` are packed to, if they are, once they are there.
        leaf: what follows a module's name where transformers compares it with those that stay.
        is_asked_for: its settings are those of an object of transformers: which modules stay is theirs to say.
    """

    name: str
    module: str | None
    missing: str
    skipped: str
    settings: Callable[[torch.dtype], dict[str, Any]]
    of_rows: Callable[[torch.Tensor], Tensors]
    of_weight: Callable[[torch.Tensor], Tensors] = lambda weight: {}  # noqa: ARG005 - most have nothing
    attributes: Callable[[torch.Tensor], str | None] = lambda weight: None  # noqa: ARG005 - most have none
    fits: Callable[[tuple[int, ...]], bool] = lambda shape: len(shape) == 2
    takes: str = "any number of rows and columns"
    lists_all: bool = False
    takes_experts: bool = False
    of_scales: Callable[[torch.Tensor, torch.Tensor], Tensors] | None = None
    leaf: str = ""
    is_asked_for: bool = False

    def outputs(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
        """What a weight becomes: tensors without values."""
        weight = torch.empty(shape, dtype=dtype, device="meta")
        made = self.of_rows(weight) | self.of_weight(weight)
        if self.of_scales is not None:
            made |= self.of_scales(weight, torch.zeros(self.num_scales(weight), dtype=torch.float32, device="cpu"))
        return {end: tensor.to("meta") for end, tensor in made.items()}

    def num_scales(self, weight: torch.Tensor) -> int:
        """The scales of `weight`, which is on the meta device, before they are packed."""
        return len(self.of_rows(weight)[SCALES])


def check_package(codec: QuantCodec) -> None:
    """Import the package that `codec` takes.

    Raises:
        UnsupportedError: it is not there; the message says what to install.
    """
    if codec.module is None:
        return
    if importlib.util.find_spec(codec.module) is None:
        raise UnsupportedError(f"codec={codec.name!r} needs the package {codec.module}: {codec.missing}")
    with quiet_imports():
        importlib.import_module(codec.module)
