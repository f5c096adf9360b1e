"""State dicts have the checkpoint's values, those that are loaded into a module and those that are taken from one.

Others are refused. torch collects what fails while it copies values, and raises one error of its own for all of it;
what is asked before a module copies anything is raised as it is. A state dict that is taken while a layer computes, in
a hook or by another thread, has no weights whose memory is going to hold others. It knows one module's own tensors. It
refuses to know models.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from itertools import chain
from typing import Any

from torch import nn

from airstream.compat.assembled import make_as_loaded
from airstream.model.absent import Absent
from airstream.model.binding import holds
from airstream.model.weight import Weight
from airstream.model.weight_refusals import refuse_change


def check_state_dicts(modules: Iterable[nn.Module]) -> None:
    """Let each of `modules` look at what is about to be loaded into it. A copy of one, of plain weights, lets it be."""
    for module in modules:
        module.register_load_state_dict_pre_hook(_check)  # type: ignore[no-untyped-call]  # torch gives it no types
        module.register_state_dict_pre_hook(_make_as_loaded)  # type: ignore[no-untyped-call]
        module.register_state_dict_post_hook(_keep_no_loans)  # type: ignore[no-untyped-call]


def _check(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: object) -> None:
    """Put the weights that are there in the place of those that are the same, lest torch compares them again."""
    for name, ours in chain(module._parameters.items(), module._buffers.items()):
        stored = getattr(ours, "stored", None)
        if stored is None or prefix + name not in state_dict:
            continue
        if not holds(state_dict[prefix + name], stored):
            refuse_change(stored.name)
        state_dict[prefix + name] = ours


def _make_as_loaded(module: nn.Module, *_: object) -> None:
    """What a pass has made of packed weights is not what the checkpoint has."""
    for weight in module._parameters.values():
        make_as_loaded(weight)


def _keep_no_loans(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: object) -> None:
    """Put what reads its values from the checkpoint in the place of weights that are lent."""
    for name in (*module._parameters, *module._buffers):
        weight = state_dict.get(prefix + name)
        if isinstance(weight, Weight) and weight.is_lent:
            is_parameter = name in module._parameters
            state_dict[prefix + name] = Absent.in_place_of(weight, weight.stored, weight.device, is_parameter)
