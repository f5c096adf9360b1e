"""This says which weights of a model are quantised: those of linear modules inside its layers, and of experts.

Embeddings, the lm_head, norms, biases, convolutions and routers stay as they are, and whatever a format has no place
for. What is said in `config.json` is what transformers makes of it: the choice is checked with its own rule.

It knows modules. It refuses to know where their weights lie, and how one is quantised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from airstream.compat.quant_codec import QuantCodec
from airstream.compat.weights import tied_names
from airstream.errors import UnsupportedError

ROUTERS = ("gate", "router", "shared_expert_gate", "classifier")
"""What modules are called that choose experts. Few numbers, on which much depends."""

EXPERTS = "experts"
"""What transformers calls a module that holds the weights of all experts of a layer, and packs in some formats."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What of a model is quantised.

    Attributes:
        linear: names of modules, the weight of each of which is quantised.
        experts: names of modules, all weights of each of which are.
        settings: what `config.json` says of it, as `quantization_config`.
    """

    linear: frozenset[str]
    experts: frozenset[str]
    settings: dict[str, Any]


def choose_modules(model: PreTrainedModel, units: Sequence[str], codec: QuantCodec, dtype: torch.dtype) -> Choice:
    """What of `model`, which is on the meta device and computes in `dtype`, is quantised by `codec`.

    Args:
        units: the names of its layers.

    Raises:
        UnsupportedError: nothing is, or it has experts and transformers does not load any of this format.
    """
    experts = _experts(model, units)
    if experts and not codec.takes_experts:
        raise UnsupportedError(
            f"codec={codec.name!r} would leave the experts of {type(model).__name__}, most of it, as they are: "
            "transformers loads quantised experts in one format only, 'fp8'"
        )
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    settings = codec.settings(dtype)
    tied = {name.rpartition(".")[0] for pair in tied_names(model).items() for name in pair}
    given = settings.get(codec.skipped) if codec.is_asked_for else None
    if codec.is_asked_for:
        wanted = _converted(model, linear, codec, given, tied)
    else:
        wanted = {name for name, module in linear.items() if _is_wanted(name, module, units, codec)}
    wanted |= {name for name, shapes in experts.items() if all(codec.fits(shape[1:]) for shape in shapes)}
    wanted -= tied
    skipped, said = _skipped(model, {*linear, *experts}, wanted, codec, given)
    chosen = frozenset(name for name in wanted if should_convert_module(name + codec.leaf, skipped))
    if not chosen:
        raise UnsupportedError(
            f"codec={codec.name!r} takes weights of linear modules (nn.Linear) with {codec.takes}, and no layer of "
            f"{type(model).__name__} has one. Stream the checkpoint as it is"
        )
    settings[codec.skipped] = sorted(set(linear) - chosen) if codec.lists_all else said
    return Choice(chosen - experts.keys(), chosen & experts.keys(), settings)


def _converted(
    model: PreTrainedModel, linear: Mapping[str, nn.Module], codec: QuantCodec, given: list[str] | None, tied: set[str]
) -> set[str]:
    """The modules that transformers quantises if it is `given` those that stay, but for what does not fit."""
    stay = HfQuantizer.get_modules_to_not_convert(model, given, model._keep_in_fp32_modules)
    found = {
        name
        for name, module in linear.items()
        if type(module) is nn.Linear and should_convert_module(name + codec.leaf, stay)
    }
    if lost := found & tied:
        raise UnsupportedError(
            f"codec={codec.name!r} cannot have {codec.skipped}={given!r}: {min(lost)} is one with the embedding, which "
            "stays as it is: name it there, too"
        )
    return {name for name in found if codec.fits(tuple(linear[name].weight.shape))}  # type: ignore[arg-type]


def _is_wanted(name: str, module: nn.Module, units: Sequence[str], codec: QuantCodec) -> bool:
    """Whether the linear `module` is one of a layer, and `codec` has a place for it."""
    return (
        type(module) is nn.Linear  # a class of its own may do more with its weights
        and _is_in(name, units)
        and name.rpartition(".")[2] not in ROUTERS
        and codec.fits(tuple(module.weight.shape))
    )


def _experts(model: PreTrainedModel, units: Sequence[str]) -> Mapping[str, list[tuple[int, ...]]]:
    """The modules that hold experts, and the shapes of their weights: (experts, rows, columns)."""
    found = {
        name: [tuple(each.shape) for each in module.parameters(recurse=False) if each.dim() == 3]
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == EXPERTS and _is_in(name, units)
    }
    return {name: shapes for name, shapes in found.items() if shapes}


def _is_in(name: str, units: Sequence[str]) -> bool:
    return name.startswith(tuple(f"{unit}." for unit in units))


def _skipped(
    model: PreTrainedModel, all_modules: set[str], wanted: set[str], codec: QuantCodec, given: list[str] | None
) -> tuple[list[str], list[str] | None]:
    """What transformers is not to quantise, and how `config.json` says it: as `given` if that will do.

    None is transformers' default.
    """
    kept_wide = list(model._keep_in_fp32_modules or ())
    default = HfQuantizer.get_modules_to_not_convert(model, given)
    if {name for name in all_modules if should_convert_module(name + codec.leaf, default + kept_wide)} == wanted:
        return default + kept_wide, given
    said = sorted({*default, *(all_modules - wanted)})
    return said + kept_wide, said
