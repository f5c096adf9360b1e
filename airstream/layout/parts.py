"""Which parts of a model are streamed, kept, or read row by row.

A unit is what is streamed as one: a child of an outermost `nn.ModuleList`, which is where transformers keeps the layers
of every architecture. A child that only holds others itself, a stage of a vision tower say, is never called: the layers
in it are units. Everything outside has a stated place: the lm_head is resident or streamed as the planner decides, of
embedding tables only the rows that are needed are read, and the small rest is resident.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from airstream.layout.tensors import TensorSpec
from airstream.reporting.units import MIB

LARGE_TABLE_BYTES = 16 * MIB
"""An embedding table other than the token embedding is worth leaving on disk from this size on."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of a model by what happens to them. Tied names appear under each of their names.

    Attributes:
        units: unit name -> its tensors, in the order in which the model lists them.
        stacks: the number of consecutive units that belong to each ModuleList; batches do not cross them.
        head: the lm_head's module name and tensors, if it can be streamed.
        rows: tables read row by row, by parameter name.
        resident: everything else.
    """

    units: Mapping[str, tuple[TensorSpec, ...]]
    stacks: tuple[int, ...]
    head: tuple[str, tuple[TensorSpec, ...]] | None
    rows: Mapping[str, TensorSpec]
    resident: tuple[TensorSpec, ...]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """All tensors by name."""
        in_units = (spec for tensors in self.units.values() for spec in tensors)
        in_head = self.head[1] if self.head else ()
        return {spec.name: spec for spec in (*in_units, *in_head, *self.rows.values(), *self.resident)}


def find_units(model: nn.Module) -> list[list[str]]:
    """The names of all units, one list per outermost ModuleList whose modules are called."""
    stacks: list[list[str]] = []

    def visit(module: nn.Module, prefix: str) -> None:
        children = {f"{prefix}{name}": child for name, child in module.named_children()}
        if isinstance(module, nn.ModuleList):
            units = [name for name, child in children.items() if _is_called(child)]
            stacks.extend([units] if units else [])
            children = {name: child for name, child in children.items() if name not in units}
        for name, child in children.items():
            visit(child, f"{name}.")

    visit(model, "")
    return stacks


def _is_called(module: nn.Module) -> bool:
    """Whether it computes: lists, and plain modules that things were put into, have no `forward`."""
    return type(module).forward is not nn.Module.forward


def divide(model: PreTrainedModel, specs: Mapping[str, TensorSpec]) -> Parts:
    """Decide for every tensor in `specs` what happens to it."""
    units: dict[str, tuple[TensorSpec, ...]] = {}
    stacks = []
    shared = _shared_between_units(model, specs)
    for stack in find_units(model):
        owned = {unit: _owned_by(unit, specs, shared) for unit in stack}
        streamed = {unit: tensors for unit, tensors in owned.items() if tensors}
        units |= streamed
        stacks.append(len(streamed))
    placed = {spec.name for tensors in units.values() for spec in tensors}
    head = _head(model, specs, placed)
    placed |= {spec.name for spec in head[1]} if head else set()
    rows = _row_tables(model, specs, placed)
    placed |= rows.keys()
    resident = tuple(spec for name, spec in specs.items() if name not in placed)
    return Parts(units, tuple(count for count in stacks if count), head, rows, resident)


def _owned_by(unit: str, specs: Mapping[str, TensorSpec], shared: set[str]) -> tuple[TensorSpec, ...]:
    prefix = f"{unit}."
    return tuple(spec for name, spec in specs.items() if name.startswith(prefix) and name not in shared)


def _shared_between_units(model: nn.Module, specs: Mapping[str, TensorSpec]) -> set[str]:
    """Names whose bytes another name uses too, at least one of them in a unit: such weights have to stay."""
    prefixes = tuple(f"{unit}." for stack in find_units(model) for unit in stack)
    uses = Counter(spec.pieces for spec in specs.values() if spec.pieces)
    in_units = {spec.pieces for name, spec in specs.items() if name.startswith(prefixes)}
    return {name for name, spec in specs.items() if uses[spec.pieces] > 1 and spec.pieces in in_units}


def _head(
    model: PreTrainedModel, specs: Mapping[str, TensorSpec], placed: set[str]
) -> tuple[str, tuple[TensorSpec, ...]] | None:
    """The lm_head, if it is a plain linear layer outside all units, so that a hook on it sees every use of it."""
    module = _embeddings(model, "get_output_embeddings")
    if not isinstance(module, nn.Linear):
        return None
    name = next((name for name, candidate in model.named_modules() if candidate is module), None)
    tensors = _owned_by(name, specs, placed) if name else ()
    return (name, tensors) if name and f"{name}.weight" in {spec.name for spec in tensors} else None


def _row_tables(model: PreTrainedModel, specs: Mapping[str, TensorSpec], placed: set[str]) -> dict[str, TensorSpec]:
    """Embedding tables to look rows up in: those of tokens, and other large ones."""
    tokens = _embeddings(model, "get_input_embeddings")
    found = []
    for name, module in model.named_modules():
        spec = specs.get(f"{name}.weight")
        # A class of its own may do more with its weights than look rows up.
        if type(module) in (nn.Embedding, type(tokens)) and spec is not None and spec.name not in placed:
            found.append((module, spec))
    shapes = {spec.shape for module, spec in found if module is tokens}  # encoder and decoder may have one each
    return {
        spec.name: spec
        for _, spec in found
        if len(spec.pieces) == 1 and (spec.shape in shapes or spec.nbytes >= LARGE_TABLE_BYTES)
    }


def _embeddings(model: PreTrainedModel, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (NotImplementedError, AttributeError):  # some architectures have none, or no single one
        return None
