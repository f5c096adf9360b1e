"""This refuses state dicts with other values than the checkpoint's, wherever in a model they are loaded.

torch collects what fails while it copies values, and raises one error of its own for all of it. What is asked before a
module copies anything is raised as it is. It knows one module's own tensors. It refuses to know models.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from itertools import chain
from typing import Any

from torch import nn

from airstream.model.binding import holds
from airstream.model.weight_refusals import refuse_change


def check_state_dicts(modules: Iterable[nn.Module]) -> None:
    """Let each of `modules` look at what is about to be loaded into it. A copy of one, of plain weights, lets it be."""
    for module in modules:
        module.register_load_state_dict_pre_hook(_check)  # type: ignore[no-untyped-call]  # torch gives it no types


def _check(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: object) -> None:
    """Put the weights that are there in the place of those that are the same, lest torch compares them again."""
    for name, ours in chain(module._parameters.items(), module._buffers.items()):
        stored = getattr(ours, "stored", None)
        if stored is None or prefix + name not in state_dict:
            continue
        if not holds(state_dict[prefix + name], stored):
            refuse_change(stored.name)
        state_dict[prefix + name] = ours
