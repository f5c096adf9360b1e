"""This says which layers of a model are alike, so that what is measured of one need not be measured of all of them.

Two layers are of one kind if they have the same modules of the same classes with the same shapes and settings, but for
their own number. A setting that cannot be compared makes them different: then more is measured than has to be.

It refuses to know what is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

OWN_NUMBER = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "index"})
"""What layers of transformers call their own number."""

MACHINERY = frozenset(vars(nn.Module()))
"""Attributes that every module has, whatever it computes."""

SETTINGS = (int, float, str, bool, type(None), torch.dtype)


@contextmanager
def one_of_each_kind(part: nn.Module, states: Sequence[object]) -> Iterator[list[int]]:
    """Leave in `part` only the first layers: as many as it takes to have one of every kind.

    Gives for each of them how many layers it stands for, 0 if an earlier one stands for it. Gives nothing, and leaves
    all layers in place, if there is not just one list of as many layers as there are `states`.

    Args:
        part: its forward pass visits its layers in order.
        states: what each layer will keep, empty; layers whose states differ in kind do so, too.
    """
    stacks = [stack for stack in _stacks(part) if len(stack[2]) == len(states)]
    if len(stacks) != 1:
        yield []
        return
    parent, name, layers = stacks[0]
    kinds = [(layer_kind(layer), _settings(state)) for layer, state in zip(layers, states, strict=True)]
    firsts = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    sizes = Counter(kinds)
    needed = max(firsts.values()) + 1
    setattr(parent, name, nn.ModuleList(list(layers)[:needed]))
    try:
        yield [sizes[kind] if firsts[kind] == number else 0 for number, kind in enumerate(kinds[:needed])]
    finally:
        setattr(parent, name, layers)


def _stacks(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    """The outermost lists of modules, each with the module that has it and its name there."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield module, name, child
        else:
            yield from _stacks(child)


def layer_kind(layer: nn.Module) -> Hashable:
    """Equal for layers that are alike."""
    return tuple((name, type(module), _shapes(module), _settings(module)) for name, module in layer.named_modules())


def _shapes(module: nn.Module) -> Hashable:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in own)


def _settings(owner: object) -> Hashable:
    """Attributes of `owner` by value where they are plain, else by identity: configs are shared between layers."""
    return type(owner), tuple(
        (name, _comparable(value))
        for name, value in sorted(vars(owner).items())
        if name not in OWN_NUMBER and name not in MACHINERY
    )


def _comparable(value: Any) -> Hashable:
    if isinstance(value, SETTINGS):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_comparable(item) for item in value)
    return id(value)
