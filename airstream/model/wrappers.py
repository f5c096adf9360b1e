"""This finds what adapters have put into a model: which modules are theirs, and what they cost.

It knows modules. It refuses to know what an adapter computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from airstream.compat.assembled import is_of_bitsandbytes
from airstream.errors import UnsupportedError
from airstream.model.absent import Absent
from airstream.model.weight_refusals import refuse_dora
from airstream.plan.facts import AdapterFacts

ITEM_BYTES = 4
"""PEFT computes adapters of half precision in float32 unless told otherwise."""


def strangers(model: Any, originals: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules of `model` that are not among the `originals`: wrappers, and what is in them."""
    known = {id(module) for module in originals}
    return (module for module in model.modules() if id(module) not in known)


def costs(modules: Iterable[nn.Module], head: nn.Module | None) -> AdapterFacts:
    """What wrappers and what is in them cost: all tensors, and what the largest wrapper computes.

    Args:
        head: the lm_head, whose wrapper computes logits.
    """
    modules = list(modules)
    tensors = {id(tensor): tensor for module in modules for tensor in _own_tensors(module)}
    wrappers = [(module, _wrapped(module)) for module in modules if _holds_something(module)]
    widths = [(_width(module, wrapped), wrapped is head) for module, wrapped in wrappers if wrapped is not None]
    workspaces = [_workspace(module, wrapped) for module, wrapped in wrappers if wrapped is not None]
    return AdapterFacts(
        nbytes=sum(tensor.nbytes for tensor in tensors.values()) + ITEM_BYTES * max(workspaces, default=0),
        token_bytes=ITEM_BYTES * max((width for width, is_head in widths if not is_head), default=0),
        logit_bytes=ITEM_BYTES * max((width for width, is_head in widths if is_head), default=0),
    )


def refuse_merging(modules: Iterable[nn.Module]) -> None:
    """Make wrappers refuse to change the weights that they wrap."""
    for module in modules:
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            object.__setattr__(module, "merge", _refuse_to_merge)


def refuse_looking(modules: Iterable[nn.Module]) -> None:
    """Refuse adapters that look at weights of bitsandbytes: PEFT then replaces these by copies, which are no plan's."""
    for module in modules:
        wrapped = _wrapped(module)
        if wrapped is not None and len(getattr(module, "lora_magnitude_vector", ())) and is_of_bitsandbytes(wrapped):
            refuse_dora(getattr(getattr(wrapped.weight, "stored", None), "name", type(wrapped).__name__))


def freeze(modules: Iterable[nn.Module]) -> None:
    """Nothing in them is trained, whatever PEFT has set."""
    for module in modules:
        for tensor in _own_tensors(module):
            tensor.requires_grad_(False)


def cast_copies(modules: Iterable[nn.Module]) -> None:
    """Give copies that an adapter brings of whole modules the device and dtypes of what they replace."""
    for module in modules:
        original, copies = getattr(module, "original_module", None), getattr(module, "modules_to_save", None)
        if isinstance(original, nn.Module) and isinstance(copies, nn.ModuleDict):
            for copy, (name, parameter) in itertools.product(copies.values(), original.named_parameters()):
                path, _, leaf = name.rpartition(".")
                copied = copy.get_parameter(name).to(parameter.device, parameter.dtype)
                setattr(copy.get_submodule(path), leaf, nn.Parameter(copied, requires_grad=False))


def _refuse_to_merge(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedError(
        "a streamed model does not support merging adapters: its weights are read again and again. Compute with the "
        "adapter beside them, or merge it into the checkpoint with transformers and PEFT, save that, and stream it"
    )


def _own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if not isinstance(tensor, Absent):
            yield tensor


def _holds_something(wrapper: nn.Module) -> bool:
    """Whether there is an adapter in it, or no more."""
    children = (child for name, child in wrapper.named_children() if name != "base_layer")
    return any(True for child in children for _ in child.parameters())


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module that `module` is PEFT's wrapper of, if it is one."""
    wrapped = getattr(module, "base_layer", None)
    while isinstance(wrapped, nn.Module) and hasattr(wrapped, "base_layer"):  # another wrapper
        wrapped = wrapped.base_layer
    return wrapped if isinstance(wrapped, nn.Module) else None


def _width(module: nn.Module, wrapped: nn.Module) -> int:
    """Elements beside `wrapped` of one token: its input in the adapter's dtype, the adapter's output, their sum."""
    inputs, outputs = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
    return 3 * outputs if isinstance(wrapped, nn.Embedding) else inputs + 3 * outputs


def _workspace(module: nn.Module, wrapped: nn.Module) -> int:
    """Elements of what an adapter makes of a whole weight while it computes, most of all DoRA its norm."""
    if len(getattr(module, "lora_magnitude_vector", ())) > 0:
        inputs, outputs = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
        return inputs * (inputs + 4 * outputs)
    weight = getattr(wrapped, getattr(module, "parameter_name", ""), None)  # that of a single parameter: added to it
    return 3 * weight.numel() if isinstance(weight, torch.Tensor) else 0
