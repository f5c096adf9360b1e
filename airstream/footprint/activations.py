"""This finds what a model's forward pass allocates, by passes on the meta device: shapes, no values, no memory.

It knows models and their passes. It refuses to know budgets, and leaves KV cache and lm_head to `formulas`.
"""

from __future__ import annotations

import copy
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

from airstream.compat.config_names import config_value
from airstream.compat.layer_kinds import layer_kind
from airstream.compat.packed_linear import PackedLinear
from airstream.compat.traits import CACHE_KEYWORDS, attention_of, tensors_in
from airstream.footprint.allocations import History
from airstream.footprint.attention import FusedAttention
from airstream.footprint.growth import CONTINUED_SIZES, FRESH_SIZES, Growth, PassGrowth, Size, growth_of

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
    is_packed: bool
    model: Callable[[], PreTrainedModel | None] = field(compare=False)


def measure_passes(model: PreTrainedModel, device: torch.device) -> tuple[PassGrowth, ...]:
    """How passes of `model` grow that will run on `device`; a growth for every range of contexts, longest first.

    Empty if its code looks at values, or if what it does depends on the number of tokens otherwise than by windows.
    """
    attention = str(attention_of(model.config))
    description = _described(model.config)
    is_packed = any(type(module) is PackedLinear for module in model.modules())
    return _answer(_Question(type(model), description, model.dtype, attention, device, is_packed, weakref.ref(model)))


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
                    passes = _Passes(model, part, device, length)
                    fresh, continued = passes.growth(FRESH_SIZES), passes.growth(CONTINUED_SIZES)
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


class _Passes:
    """Passes of `part` of `model`, of multiples of `length` tokens.

    What a prompt has left in its cache is what a chunk of a longer one begins with: no prompt is run twice.
    """

    def __init__(self, model: PreTrainedModel, part: nn.Module, device: torch.device, length: int) -> None:
        accepted = inspect.signature(part.forward).parameters
        self._keyword = next((name for name in CACHE_KEYWORDS if name in accepted), None) or ""
        self._caches: dict[int, DynamicCache] = {}
        self._model, self._part, self._device, self._length = model, part, device, length
        self._history = History()

    def growth(self, multiples: tuple[Size, ...]) -> Growth | None:
        sizes = [(tokens * self._length, context * self._length) for tokens, context in multiples]
        return growth_of(sizes, [self._alive(*size) for size in sizes])

    @torch.no_grad()
    def _alive(self, tokens: int, context: int) -> list[int]:
        """The bytes alive after every operation of a pass over so many tokens, without what the cache keeps of them."""
        options: dict[str, Any] = {}
        if self._keyword and self._model.can_generate():
            options = {"use_cache": True, self._keyword: self._cache_of(context - tokens)}
        cache = options.get(self._keyword)
        if context > tokens:
            options["attention_mask"] = _ids(context)
        ids = _ids(tokens)
        with FusedAttention(self._device), self._history as history:
            existing = [*self._part.parameters(), *self._part.buffers(), *tensors_in(list(options.values()))]
            history.begin([ids, *existing])
            output = self._part(input_ids=ids, **options)
        if context == tokens and cache is not None:
            self._caches[tokens] = cache
        kept = [cache, *(value for name, value in output.items() if name in CACHE_KEYWORDS)]
        return history.alive(without=list(tensors_in(kept)))

    def _cache_of(self, tokens: int) -> DynamicCache:
        """A cache with so many tokens of a prompt. The tensors are those of all such caches: they have no values."""
        if not tokens:
            return DynamicCache(config=self._model.config)
        if tokens not in self._caches:
            self._alive(tokens, tokens)
        cache = self._caches[tokens]
        return copy.deepcopy(cache, {id(tensor): tensor for tensor in tensors_in(cache)})


def _ids(tokens: int) -> torch.Tensor:
    return torch.zeros((1, tokens), dtype=torch.long, device="meta")


def _beginnings(part: nn.Module) -> dict[nn.ModuleList, int]:
    """How many layers of each stack have one of every kind among them: the others do what these do."""
    found: dict[nn.ModuleList, int] = {}
    inside = ""
    for name, module in part.named_modules():
        if isinstance(module, nn.ModuleList) and not (inside and name.startswith(inside)):
            inside = f"{name}."
            kinds = [layer_kind(layer) for layer in module]
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
