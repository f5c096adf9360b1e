"""This says which parts of a model are streamed, kept, or read row by row.

A unit is what is streamed as one: a child of an outermost `nn.ModuleList`, which is where transformers keeps the layers
of every architecture. A child that only holds others itself, a stage of a vision tower say, is never called: the layers
in it are units. Everything outside has a stated place: the lm_head is resident or streamed as the planner decides, of
embedding tables only the rows that are needed are read, and the small rest is resident.

It knows modules, and which tensors are theirs. It refuses to know budgets, and what of a layer stays in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import nn
from transformers import PreTrainedModel

from airstream.layout.tensors import TensorSpec
from airstream.reporting.units import MIB

LARGE_TABLE_BYTES = 16 * MIB
"""An embedding table other than the token embedding is worth leaving on disk from this size on."""


class Kind(Enum):
    """What happens to a part of a model."""

    LAYER = "streamed as a unit, or resident"
    HEAD = "the lm_head: streamed or resident, as the planner decides"
    TABLE = "an embedding table, of which the rows that are needed are read"
    RESIDENT = "small, and always in memory"


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors with which the same happens.

    Attributes:
        name: the module of a layer or the lm_head, the parameter that is a table; of the resident rest, nothing.
        specs: the tensors, in the order in which the model lists them.
    """

    name: str
    kind: Kind
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of a model. Tied tensors appear under each of their names.

    Attributes:
        parts: the layers in the order in which the model lists them, then the others.
        stacks: the number of consecutive layers that belong to each ModuleList; batches do not cross them.
    """

    parts: tuple[Part, ...]
    stacks: tuple[int, ...]

    def of(self, kind: Kind) -> list[Part]:
        """The parts of one kind."""
        return [part for part in self.parts if part.kind is kind]

    def specs_of(self, *kinds: Kind) -> list[TensorSpec]:
        """The tensors of all parts of these kinds."""
        return [spec for part in self.parts if part.kind in kinds for spec in part.specs]

    def in_batches(self, count: int) -> list[list[list[Part]]]:
        """The layers of each stack in batches of `count`: those of different stacks are never in one batch."""
        layers, start = self.of(Kind.LAYER), 0
        stacks = []
        for size in self.stacks:
            stack = layers[start : start + size]
            stacks.append([stack[first : first + count] for first in range(0, size, count)])
            start += size
        return stacks

    @property
    def head(self) -> Part | None:
        """The lm_head, if it can be streamed."""
        return next(iter(self.of(Kind.HEAD)), None)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """All tensors by name."""
        return {spec.name: spec for part in self.parts for spec in part.specs}


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
    parts: list[Part] = []
    stacks = []
    shared = _shared_between_units(model, specs)
    for stack in find_units(model):
        layers = [Part(unit, Kind.LAYER, _owned_by(unit, specs, shared)) for unit in stack]
        layers = [layer for layer in layers if layer.specs]
        parts += layers
        stacks.append(len(layers))
    for find in (_head, _tables):
        parts += find(model, specs, {spec.name for part in parts for spec in part.specs})
    placed = {spec.name for part in parts for spec in part.specs}
    rest = tuple(spec for name, spec in specs.items() if name not in placed)
    return Parts((*parts, Part("", Kind.RESIDENT, rest)), tuple(count for count in stacks if count))


def _owned_by(unit: str, specs: Mapping[str, TensorSpec], shared: set[str]) -> tuple[TensorSpec, ...]:
    prefix = f"{unit}."
    return tuple(spec for name, spec in specs.items() if name.startswith(prefix) and name not in shared)


def _shared_between_units(model: nn.Module, specs: Mapping[str, TensorSpec]) -> set[str]:
    """Names whose bytes another name uses too, at least one of them in a unit: such weights have to stay."""
    prefixes = tuple(f"{unit}." for stack in find_units(model) for unit in stack)
    uses = Counter(spec.pieces for spec in specs.values() if spec.pieces)
    in_units = {spec.pieces for name, spec in specs.items() if name.startswith(prefixes)}
    return {name for name, spec in specs.items() if uses[spec.pieces] > 1 and spec.pieces in in_units}


def _head(model: PreTrainedModel, specs: Mapping[str, TensorSpec], placed: set[str]) -> list[Part]:
    """The lm_head, if it is a plain linear layer outside all units, so that a hook on it sees every use of it."""
    module = _embeddings(model, "get_output_embeddings")
    if not isinstance(module, nn.Linear):
        return []
    name = next((name for name, candidate in model.named_modules() if candidate is module), None)
    tensors = _owned_by(name, specs, placed) if name else ()
    is_there = not {f"{name}.weight", f"{name}.packed"}.isdisjoint(spec.name for spec in tensors)
    return [Part(name, Kind.HEAD, tensors)] if name and is_there else []


def _tables(model: PreTrainedModel, specs: Mapping[str, TensorSpec], placed: set[str]) -> list[Part]:
    """Embedding tables to look rows up in: those of tokens, and other large ones."""
    tokens = _embeddings(model, "get_input_embeddings")
    found = []
    for name, module in model.named_modules():
        spec = specs.get(f"{name}.weight")
        # A class of its own may do more with its weights than look rows up.
        if type(module) in (nn.Embedding, type(tokens)) and spec is not None and spec.name not in placed:
            found.append((module, spec))
    shapes = {spec.shape for module, spec in found if module is tokens}  # encoder and decoder may have one each
    return [
        Part(spec.name, Kind.TABLE, (spec,))
        for _, spec in found
        if len(spec.pieces) == 1 and (spec.shape in shapes or spec.nbytes >= LARGE_TABLE_BYTES)
    ]


def has_head(model: PreTrainedModel) -> bool:
    """Whether there is an lm_head, of whatever kind."""
    return _embeddings(model, "get_output_embeddings") is not None


def _embeddings(model: PreTrainedModel, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (NotImplementedError, AttributeError):  # some architectures have none, or no single one
        return None
