"""Putting tensors into modules and taking them out again, without anything the token loop would feel.

A module's entry for a parameter is replaced, not its data: a meta tensor cannot be given storage, and replacing costs
a microsecond. Taken out means the meta placeholder is back, so that accidental use raises instead of computing garbage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from airstream.layout import TensorSpec


class Binding:
    """The places in `model` where the tensors of `specs` belong."""

    def __init__(self, model: nn.Module, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._places = [_place(model, spec.name) for spec in specs]
        self._placeholders = [registry[leaf] for registry, leaf, _ in self._places]

    def views(self, memory: torch.Tensor, offsets: Mapping[str, int]) -> list[torch.Tensor]:
        """The tensors as views of `memory`, a uint8 slab in which they start at `offsets`. Ready for `bind`."""
        views = []
        for spec, (_, _, is_parameter) in zip(self._specs, self._places, strict=True):
            view = view_of(memory, offsets[spec.name], spec)
            views.append(nn.Parameter(view, requires_grad=False) if is_parameter else view)
        return views

    def bind(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put `tensors` in place."""
        for (registry, leaf, _), tensor in zip(self._places, tensors, strict=True):
            registry[leaf] = tensor

    def unbind(self) -> None:
        """Put the placeholders back."""
        for (registry, leaf, _), placeholder in zip(self._places, self._placeholders, strict=True):
            registry[leaf] = placeholder


def view_of(memory: torch.Tensor, offset: int, spec: TensorSpec) -> torch.Tensor:
    """The tensor `spec` that starts at byte `offset` of `memory`."""
    numbers = memory[offset : offset + spec.nbytes].view(spec.dtype)
    return numbers.view(spec.shape[::-1]).t() if spec.transposed else numbers.view(spec.shape)


def _place(model: nn.Module, name: str) -> tuple[dict[str, torch.Tensor | None], str, bool]:
    """The registry that holds tensor `name`, its key there, and whether it is a parameter."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    is_parameter = leaf in module._parameters
    registry = module._parameters if is_parameter else module._buffers
    return registry, leaf, is_parameter  # type: ignore[return-value]  # torch types the values of one as Parameter
