"""This puts tensors into modules and takes them out again, without anything the token loop would feel.

A module's entry for a parameter is replaced, not its data: replacing costs a microsecond. Taken out means that the
placeholder is back, so that accidental use raises instead of computing garbage. Modules are found by the names that
they had when the model was built: adapters wrap them later, and wrappers have other names.

A weight that somebody has replaced, deleted or written to is noticed before it is overwritten, and when it is taken
out: a change would last under one budget and be lost under another, so that it is refused under all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from airstream.compat.assembled import Assembled
from airstream.layout.tensors import TensorSpec, view_of
from airstream.model.absent import Absent
from airstream.model.asking import Askers, Asking, may_ask
from airstream.model.conversion import Converter
from airstream.model.stored import Stored
from airstream.model.weight import Loan, Weight, weight_of
from airstream.model.weight_refusals import refuse_change


@dataclass(frozen=True, slots=True)
class Views:
    """Tensors, ready to be bound.

    Attributes:
        weights: those among them that nothing may write to, and of what each has the values.
        assembled: those among them that a forward pass changes, and what undoes that.
        askers: those among them that ask for a gradient while the model computes.
        loans: what those among them live on whose memory is going to hold others.
    """

    tensors: Sequence[torch.Tensor]
    weights: Sequence[tuple[Weight | Absent, Stored]] = ()
    assembled: Sequence[Assembled] = ()
    askers: Askers = ()
    loans: Sequence[Loan] = ()


class Modules(Protocol):
    """Modules by name: a model, or the modules that it had once."""

    def get_submodule(self, target: str) -> nn.Module:
        """The module that is called `target`."""


class OriginalModules:
    """The modules of `model` by the names they have now, whatever wraps or replaces them later. Keeps none alive."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = weakref.WeakValueDictionary(model.named_modules(remove_duplicate=False))

    def get_submodule(self, target: str) -> nn.Module:
        """The module that had this name. KeyError if there was none, or if it is gone."""
        return self._modules[target]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def owners(self, specs: Iterable[TensorSpec]) -> Iterator[nn.Module]:
        """The modules that tensors of `specs` belong to, as far as they are still there."""
        names = {spec.name.rpartition(".")[0] for spec in specs}
        return (module for name in names if (module := self._modules.get(name)) is not None)


def take_out(modules: Modules, specs: Iterable[TensorSpec], stored: Mapping[str, Stored], device: torch.device) -> None:
    """Leave a placeholder, as on `device`, in the place of every tensor of `specs`."""
    for spec in specs:
        registry, leaf, is_parameter = _place(modules, spec.name)
        registry[leaf] = Absent.in_place_of(registry[leaf], stored[spec.name], device, is_parameter)


@dataclass(frozen=True, slots=True)
class Binder:
    """A binder has what the bindings of one model have in common.

    Attributes:
        stored: the values that weights are to have, by name.
        convert: makes what has to be made of the bytes that some slabs bring.
        asking: has the weights in place ask for a gradient while the model computes.
    """

    modules: Modules
    stored: Mapping[str, Stored]
    convert: Converter
    asking: Asking


class Binding:
    """The places in the modules of `binder` where the tensors of `specs` belong."""

    def __init__(self, binder: Binder, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._build = binder.convert.build
        self._asking = binder.asking
        self._stored = [binder.stored[spec.name] for spec in specs]
        self._places = [_place(binder.modules, spec.name) for spec in specs]
        self._placeholders = self.guarded([registry[leaf] for registry, leaf, _ in self._places])
        self._current = self._placeholders
        self._was_changed: str | None = None

    @torch.inference_mode(False)  # torch counts no changes of what is made in it
    def views(self, memory: torch.Tensor, offsets: Mapping[str, int], is_lent: bool = False) -> Views:
        """The tensors as views of `memory`, a uint8 slab in which they start at `offsets`. Ready for `bind`.

        Args:
            is_lent: the memory is going to hold others.
        """
        tensors: list[torch.Tensor] = []
        assembled, askers, lent = [], [], []
        counted = memory.data if is_lent else memory  # it has a count of its own
        for spec, stored, (_, _, is_parameter) in zip(self._specs, self._stored, self._places, strict=True):
            if spec.made_by is not None and spec.made_by.is_object:
                assembled.append(self._build(spec.made_by, memory, offsets))
                tensors.append(assembled[-1].tensor)
            else:
                weight = weight_of(view_of(counted, offsets[spec.name], spec), stored, is_parameter, is_lent)
                tensors.append(weight)
                if may_ask(weight, is_parameter):
                    askers.append((weight, stored))
                if isinstance(weight, Weight):
                    lent.append(weight)
        loans = [Loan(counted, lent)] if is_lent and lent else []
        return self.guarded(tensors, assembled, askers, loans)

    def bind(self, views: Views) -> None:
        """Put the tensors of `views` in place.

        Raises:
            UnsupportedError: somebody else has put something there.
        """
        self.check()
        self._asking.remove(self._current.askers)
        self._current = views
        for (registry, leaf, _), tensor in zip(self._places, views.tensors, strict=True):
            registry[leaf] = tensor
        for loan in views.loans:
            loan.begin()
        self._asking.add(views.askers)

    def unbind(self) -> None:
        """Put the placeholders back, and what was bound into the state in which it was. What else is there stays.

        Idempotent; where an interrupt has kept it from coming to its end, the next call does all of it.
        """
        bound = self._current
        if bound is self._placeholders:
            return
        self._asking.remove(bound.askers)
        places = zip(self._places, bound.tensors, self._placeholders.tensors, strict=True)
        for (registry, leaf, _), tensor, placeholder in places:
            if registry.get(leaf) is tensor:
                registry[leaf] = placeholder
        for assembled in bound.assembled:
            assembled.restore()
        for loan in bound.loans:
            loan.end()
        self._current = self._placeholders

    def check(self) -> None:
        """Costs a microsecond for a layer, unless something has been changed: then the values are compared.

        Raises:
            UnsupportedError: somebody has changed a weight, now or ever while it was in the ring.
        """
        current = self._current
        for (registry, leaf, _), tensor in zip(self._places, current.tensors, strict=True):
            if registry.get(leaf) is not tensor:
                return self._judge()
        for weight, stored in current.weights:
            if getattr(weight, "stored", None) is not stored or weight._version != weight.accepted:
                return self._judge()
        if self._was_changed is not None:
            refuse_change(self._was_changed)
        return None

    def guarded(
        self,
        tensors: Sequence[torch.Tensor],
        assembled: Sequence[Assembled] = (),
        askers: Askers = (),
        loans: Sequence[Loan] = (),
    ) -> Views:
        """`tensors`, one for each place, ready for `bind`."""
        pairs = zip(tensors, self._stored, strict=True)
        weights = [(own, stored) for own, stored in pairs if isinstance(own, Weight | Absent)]
        return Views(tensors, weights, assembled, askers, loans)

    def _judge(self) -> None:
        """Accept changes that have left the checkpoint's values, which adapters bring along; refuse others.

        One whose insides were swapped with another tensor's (`torch.utils.swap_tensors`) is no weight of ours any more.
        """
        for weight, stored in self._current.weights:
            if getattr(weight, "stored", None) is not stored:
                self._was_changed = stored.name
                refuse_change(stored.name)
        places = zip(self._specs, self._stored, self._places, self._current.tensors, strict=True)
        for spec, stored, (registry, leaf, _), ours in places:
            found = registry.get(leaf)
            is_touched = isinstance(ours, Weight) and ours.is_touched
            if found is ours and not is_touched:
                continue
            if is_touched and not stored.has(ours):
                self._was_changed = spec.name  # its memory may pass to another layer, and the traces with it
                refuse_change(spec.name)
            if found is None or not holds(found, stored):
                refuse_change(spec.name)
            registry[leaf] = ours
            if isinstance(ours, Weight):
                ours.accepted = ours._version


def holds(found: torch.Tensor, stored: Stored) -> bool:
    """Whether `found` has the values that are `stored`."""
    if isinstance(found, Absent):
        return found.stored is stored
    return stored.has(found)


def _place(modules: Modules, name: str) -> tuple[dict[str, torch.Tensor], str, bool]:
    """The registry that holds tensor `name`, its key there, and whether it is a parameter."""
    path, _, leaf = name.rpartition(".")
    module = modules.get_submodule(path)
    is_parameter = leaf in module._parameters
    registry = module._parameters if is_parameter else module._buffers
    return registry, leaf, is_parameter  # type: ignore[return-value]  # torch types the values of one as Parameter
