"""Putting tensors into modules and taking them out again, without anything the token loop would feel.

A module's entry for a parameter is replaced, not its data: replacing costs a microsecond. Taken out means that the
placeholder is back, so that accidental use raises instead of computing garbage. Modules are found by the names that
they had when the model was built: adapters wrap them later, and wrappers have other names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from airstream.compat import Assembled
from airstream.model.absent import Absent
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


class Modules(Protocol):
    """Modules by name: a model, or the modules that it had once."""

    def get_submodule(self, target: str) -> nn.Module: ...


class OriginalModules:
    """The modules of `model` by the names they have now, whatever wraps or replaces them later. Keeps none alive."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = weakref.WeakValueDictionary(model.named_modules(remove_duplicate=False))

    def get_submodule(self, target: str) -> nn.Module:
        return self._modules[target]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def owners(self, specs: Iterable[TensorSpec]) -> Iterator[nn.Module]:
        """The modules that tensors of `specs` belong to, as far as they are still there."""
        names = {spec.name.rpartition(".")[0] for spec in specs}
        return (module for name in names if (module := self._modules.get(name)) is not None)


def take_out(
    modules: Modules,
    specs: Iterable[TensorSpec],
    device: torch.device,
    is_stored: Callable[[TensorSpec, torch.Tensor], bool],
) -> None:
    """Leave a placeholder, as on `device`, in the place of every tensor of `specs`.

    Args:
        is_stored: whether these are the values that the checkpoint has.
    """
    for spec in specs:
        registry, leaf, _ = _place(modules, spec.name)
        registry[leaf] = Absent(spec.name, registry[leaf], device, partial(is_stored, spec))


class Binding:
    """The places in `modules` where the tensors of `specs` belong."""

    def __init__(self, modules: Modules, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._places = [_place(modules, spec.name) for spec in specs]
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

    def foreign(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What somebody else has put in place of the tensors of the specs, by name."""
        current = self._placeholders if self._bound is None else self._bound.tensors
        for spec, (registry, leaf, _), expected in zip(self._specs, self._places, current, strict=True):
            if registry[leaf] is not expected:
                yield spec.name, registry[leaf]


def _place(modules: Modules, name: str) -> tuple[dict[str, torch.Tensor], str, bool]:
    """The registry that holds tensor `name`, its key there, and whether it is a parameter."""
    path, _, leaf = name.rpartition(".")
    module = modules.get_submodule(path)
    is_parameter = leaf in module._parameters
    registry = module._parameters if is_parameter else module._buffers
    return registry, leaf, is_parameter  # type: ignore[return-value]  # torch types the values of one as Parameter
