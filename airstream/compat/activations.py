"""What a model's forward pass allocates, found by passes on the meta device: shapes, no values, no memory."""

from __future__ import annotations

import functools
import inspect
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from airstream.allocations import History
from airstream.compat.attention import FusedAttention
from airstream.compat.layer_kinds import kind_of
from airstream.compat.traits import CACHE_KEYWORDS, config_value, tensors_in
from airstream.growth import CONTINUED_SIZES, FRESH_SIZES, Growth, PassGrowth, Size, growth_of

LENGTH = 32
"""Tokens that the sizes of the passes are multiples of: more than what is rounded up to a few."""

WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
"""What configs call the number of tokens from which on attention does not reach back to all of them."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of a model; equal for models that do the same, so that none is asked twice."""

    cls: type
    config: str
    dtype: torch.dtype
    attention: str
    device: torch.device
    model: Callable[[], PreTrainedModel | None] = field(compare=False)


def measure_passes(model: PreTrainedModel, device: torch.device) -> tuple[PassGrowth, ...]:
    """How passes of `model` grow that will run on `device`; a growth for every range of contexts, longest first.

    Empty if its code looks at values, or if what it does depends on the number of tokens otherwise than by windows.
    """
    attention = str(model.config._attn_implementation)
    description = _described(model.config)
    return _answer(_Question(type(model), description, model.dtype, attention, device, weakref.ref(model)))


def _described(config: Any) -> str:
    """Equal for configs that say the same, as far as they can be written down."""
    try:
        return str(config.to_json_string(use_diff=False))
    except Exception:  # one that code of its own makes may hold anything
        return uuid.uuid4().hex


@functools.lru_cache(maxsize=64)
def _answer(question: _Question) -> tuple[PassGrowth, ...]:
    model, device = question.model(), question.device
    assert model is not None  # whoever asks has it
    if model.config.is_encoder_decoder:
        return ()  # two sequences, each of its own length
    window = _window_of(model.config)
    ranges = [(LENGTH, 0)] if window > LENGTH * CONTINUED_SIZES[-1][1] or not window else []
    if window:
        ranges.insert(0, (max(window, LENGTH), window if ranges else 0))
    found = [_measure(model, device, length, start) for length, start in ranges]
    return () if None in found else tuple(growth for growth in found if growth is not None)


def _window_of(config: Any) -> int:
    """The longest there is; 0 if attention is not limited."""
    text = config.get_text_config(decoder=True)
    windows = [config_value(text, name) for name in WINDOWS]
    return max((window for window in windows if isinstance(window, int)), default=0)


def _measure(model: PreTrainedModel, device: torch.device, length: int, start: int) -> PassGrowth | None:
    for part in _candidates(model):
        for stacks in (_beginnings(part), {}):
            try:
                with _shortened(stacks):
                    fresh = _growth(model, part, device, length, FRESH_SIZES)
                    continued = _growth(model, part, device, length, CONTINUED_SIZES)
            except Exception:  # any model's code may look at values, which do not exist here
                continue
            if fresh is not None and continued is not None:
                return PassGrowth(fresh, continued, start)
    return None


def _candidates(model: PreTrainedModel) -> list[nn.Module]:
    """The model without its head; of a multimodal one, whose whole pass may have to see values, what reads text."""
    parts = [model.base_model]
    if hasattr(model, "get_decoder"):
        parts.append(model.get_decoder())
    return list(dict.fromkeys(part for part in parts if isinstance(part, nn.Module)))


def _growth(
    model: PreTrainedModel, part: nn.Module, device: torch.device, length: int, multiples: tuple[Size, ...]
) -> Growth | None:
    sizes = [(tokens * length, context * length) for tokens, context in multiples]
    return growth_of(sizes, [_alive(model, part, device, *size) for size in sizes])


@torch.no_grad()
def _alive(model: PreTrainedModel, part: nn.Module, device: torch.device, tokens: int, context: int) -> list[int]:
    """The bytes alive after every operation of a pass over so many tokens, without what the cache keeps of them."""
    accepted = inspect.signature(part.forward).parameters
    keyword = next((name for name in CACHE_KEYWORDS if name in accepted), None)
    options: dict[str, Any] = {}
    if keyword is not None and model.can_generate():
        options = {"use_cache": True, keyword: DynamicCache(config=model.config)}
    history = History()
    with FusedAttention(device), history:
        if context > tokens and keyword is not None and options:
            part(input_ids=_ids(context - tokens), **options)
        if context > tokens:
            options["attention_mask"] = _ids(context)
        ids = _ids(tokens)
        history.begin([ids, *part.parameters(), *part.buffers(), *tensors_in(list(options.values()))])
        output = part(input_ids=ids, **options)
        kept = [options.get(keyword or ""), *(value for name, value in output.items() if name in CACHE_KEYWORDS)]
    return history.alive(without=list(tensors_in(kept)))


def _ids(tokens: int) -> torch.Tensor:
    return torch.zeros((1, tokens), dtype=torch.long, device="meta")


def _beginnings(part: nn.Module) -> dict[nn.ModuleList, int]:
    """How many layers of each stack have one of every kind among them: the others do what these do."""
    found: dict[nn.ModuleList, int] = {}
    inside = ""
    for name, module in part.named_modules():
        if isinstance(module, nn.ModuleList) and not (inside and name.startswith(inside)):
            inside = f"{name}."
            kinds = [kind_of(layer) for layer in module]
            types = getattr(part.config, "layer_types", None) or ()
            if len(types) == len(kinds):
                kinds = list(zip(kinds, types, strict=True))
            firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
            found[module] = max(firsts, default=-1) + 1
    return found


@contextmanager
def _shortened(stacks: dict[nn.ModuleList, int]) -> Iterator[None]:
    """Within, the stacks have that many layers."""
    whole = {stack: dict(stack._modules) for stack in stacks}
    try:
        for stack, count in stacks.items():
            for name in list(stack._modules)[count:]:
                del stack._modules[name]
        yield
    finally:
        for stack, layers in whole.items():
            stack._modules.clear()
            stack._modules.update(layers)
