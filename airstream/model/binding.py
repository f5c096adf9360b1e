"""Putting tensors into modules and taking them out again, without anything the token loop would feel.

A module's entry for a parameter is replaced, not its data: a meta tensor cannot be given storage, and replacing costs
a microsecond. Taken out means the meta placeholder is back, so that accidental use raises instead of computing garbage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from airstream.compat import Assembled
from airstream.model.conversion import Converter, view_of
from airstream.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Views:
    """Tensors, ready to be bound.

    Attributes:
        assembled: those among them that a forward pass changes, and what undoes that.
    """

    tensors: Sequence[torch.Tensor]
    assembled: Sequence[Assembled] = ()


class Binding:
    """The places in `model` where the tensors of `specs` belong."""

    def __init__(self, model: nn.Module, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._places = [_place(model, spec.name) for spec in specs]
        self._placeholders = [registry[leaf] for registry, leaf, _ in self._places]
        self._bound: Views | None = None

    def views(self, memory: torch.Tensor, offsets: Mapping[str, int], convert: Converter) -> Views:
        """The tensors as views of `memory`, a uint8 slab in which they start at `offsets`. Ready for `bind`."""
        tensors: list[torch.Tensor] = []
        assembled = []
        for spec, (_, _, is_parameter) in zip(self._specs, self._places, strict=True):
            if spec.made_by is not None and spec.made_by.is_object:
                assembled.append(convert.build(spec.made_by, memory, offsets))
                tensors.append(assembled[-1].tensor)
            else:
                view = view_of(memory, offsets[spec.name], spec)
                tensors.append(nn.Parameter(view, requires_grad=False) if is_parameter else view)
        return Views(tensors, assembled)

    def bind(self, views: Views) -> None:
        """Put the tensors of `views` in place."""
        self._bound = views
        for (registry, leaf, _), tensor in zip(self._places, views.tensors, strict=True):
            registry[leaf] = tensor

    def unbind(self) -> None:
        """Put the placeholders back, and what was bound into the state in which it was."""
        bound, self._bound = self._bound, None
        if bound is None:
            return
        for (registry, leaf, _), placeholder in zip(self._places, self._placeholders, strict=True):
            registry[leaf] = placeholder
        for assembled in bound.assembled:
            assembled.restore()


def _place(model: nn.Module, name: str) -> tuple[dict[str, torch.Tensor | None], str, bool]:
    """The registry that holds tensor `name`, its key there, and whether it is a parameter."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    is_parameter = leaf in module._parameters
    registry = module._parameters if is_parameter else module._buffers
    return registry, leaf, is_parameter  # type: ignore[return-value]  # torch types the values of one as Parameter
