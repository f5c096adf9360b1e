"""This asks a model that has been built about itself: its attention, what it keeps from one token to the next.

It knows names that differ between architectures. It refuses to know what the answers are for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from airstream.compat.config_names import config_value
from airstream.compat.layer_kinds import one_of_each_kind

CACHE_KEYWORDS = ("cache", "past_key_values")
"""What forward passes call the KV cache, newest name first."""

POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed")
"""What models call a table with a row for every position."""

TOWERS = ("vision", "visual", "image", "audio")
"""What is in the names of parts whose positions are patches or frames, not tokens."""

FEW, MANY = 2, 4
"""Tokens of the passes that measure a cache: what they differ by grows with every token, the rest does not."""


def attention_of(config: Any) -> str | None:
    """The implementation of attention that a built model of `config` uses."""
    return config._attn_implementation


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Elements of the model's dtype that the cache has.

    Attributes:
        per_token: keys and values, of encoder and decoder together where there are both.
        per_sequence: whatever its length: the states of state-space and linear attention layers.
    """

    per_token: int
    per_sequence: int


def uses_eager_attention(model: PreTrainedModel) -> bool:
    """Whether attention scores are materialised, or something of their size: a bias for every two positions."""
    biased = any(name.endswith("relative_attention_bias") for name, _ in model.named_modules())
    return bool(model.config._attn_implementation == "eager") or biased


def cache_keyword(model: PreTrainedModel) -> str:
    """What `model` calls the KV cache among its arguments: "cache" from transformers 5.24 on."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_KEYWORDS if name in accepted), CACHE_KEYWORDS[-1])


def cached_tokens(cache: Any) -> int:
    """The length of the sequences in `cache`; 0 if it keeps none, but states."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # tuples of tensors; caches of state-space layers only
        return 0


def cache_capacity(cache: Any) -> int:
    """For how many tokens `cache` has room, or will have once it is used; 0 if it grows with them."""
    capacities = [getattr(layer, "max_cache_len", 0) for layer in getattr(cache, "layers", ())]
    return max((capacity for capacity in capacities if isinstance(capacity, int) and capacity > 0), default=0)


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens that the model has a row of a table of positions for: no sequence can be longer; None without a table."""
    part: nn.Module = model
    if hasattr(model.config, "vision_config") and hasattr(model, "get_decoder"):
        part = model.get_decoder()  # a vision tower has positions, too
    # A table for text has a row for every position that the config speaks of; one of a vision tower, for its patches.
    declared = config_value(model.config.get_text_config(decoder=True), "max_position_embeddings") or 0
    limits = [_rows_for_positions(name, module) for name, module in part.named_modules()]
    return min((limit for limit in limits if limit and limit >= declared), default=None)


def _rows_for_positions(name: str, module: nn.Module) -> int:
    """Rows of a table of positions after those that stand for padding; 0 if `module` is none."""
    if not isinstance(module, nn.Embedding) or name.rpartition(".")[2] not in POSITION_TABLES:
        return 0
    if any(word in name for word in TOWERS):
        return 0
    padding = 0 if module.padding_idx is None else module.padding_idx + 1
    return module.num_embeddings - (getattr(module, "offset", 0) or padding)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Rows of the table that tokens are looked up in; 0 if there is no such thing."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # what does not read text
        return 0
    return table.num_embeddings if isinstance(table, nn.Embedding) else 0


def rotary_limit(model: PreTrainedModel) -> int | None:
    """Tokens that the model's rotary positions were trained for; None if others go on beyond what a config says.

    None for those that are scaled, for layers that look no further back than a window, and where some layers have no
    positions at all.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = config_value(config, "rope_parameters")
    if not isinstance(kinds, Mapping) or not any("Rotary" in type(part).__name__ for part in model.modules()):
        return None
    nested = [value for value in kinds.values() if isinstance(value, Mapping)] or [kinds]
    is_plain = all(kind.get("rope_type", "default") == "default" for kind in nested)
    layers = config_value(config, "layer_types")
    sees_all = "full_attention" in layers if layers else not config_value(config, "sliding_window")
    if not is_plain or not sees_all or config_value(config, "no_rope_layers"):
        return None
    limit = config_value(config, "max_position_embeddings")
    return limit if isinstance(limit, int) else None


def cut_back(cache: Any, tokens: int) -> bool:
    """Make every layer of `cache` forget all but the first `tokens`; False if one cannot, and the cache is of no use.

    Layers may differ in how far they are: a pass that was interrupted has been through some of them.
    """
    try:
        for layer in cache.layers:
            if not getattr(layer, "is_initialized", True):
                continue  # it shares the keys and values of another one
            if (excess := layer.get_seq_length() - tokens) > 0:
                layer.crop(-excess)
            if layer.keys.shape[-2] != tokens or layer.values.shape[-2] != tokens:
                return False
    except (AttributeError, RuntimeError, ValueError, TypeError):  # windows that have slid on, and states, cannot
        return False
    return True


def measure_cache(model: PreTrainedModel) -> CacheSize | None:
    """What the cache grows to, found by forward passes on the meta device; None if they fail.

    Exact where formulas are not: latent attention, shared and sliding layers, heads repeated before they are cached.
    """
    candidates = [model.base_model]
    if not model.config.is_encoder_decoder and hasattr(model, "get_decoder"):
        candidates.append(model.get_decoder())  # of a multimodal model, whose whole pass may have to see values
    for candidate in candidates:
        try:
            few, many = (_cached_bytes(model, candidate, tokens) for tokens in (FEW, MANY))
        except Exception:  # any model's code may look at values, which do not exist here
            continue
        if many or not model.can_generate():
            item_bytes, per_token = model.dtype.itemsize, max(many - few, 0) // (MANY - FEW)
            return CacheSize(-(-per_token // item_bytes), -(-max(few - FEW * per_token, 0) // item_bytes))
    return None  # then formulas have to do


@torch.no_grad()
def _cached_bytes(model: PreTrainedModel, part: nn.Module, tokens: int) -> int:
    """Bytes that a pass of `part` over so many tokens leaves in the cache."""
    config = model.config
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    arguments: dict[str, Any] = {"input_ids": ids}
    if config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids
    accepted = inspect.signature(part.forward).parameters
    keyword = next((name for name in CACHE_KEYWORDS if name in accepted), None)
    if keyword is not None and model.can_generate():  # what does not generate keeps what it keeps unasked
        cache = DynamicCache(config=config)
        arguments["use_cache"] = True
        arguments[keyword] = EncoderDecoderCache(cache, DynamicCache()) if config.is_encoder_decoder else cache
    cache = arguments.get(keyword or "")
    states = cache.layers if isinstance(cache, DynamicCache) else ()
    with one_of_each_kind(part, states) as stands_for:
        output = part(**arguments)
    if stands_for and not any(_nbytes(vars(state)) for state in states[len(stands_for) :]):
        return sum(number * _nbytes(vars(state)) for number, state in zip(stands_for, states, strict=False))
    # Asked by their names alone: an output warns the user when it is asked for the name that it had before.
    return _nbytes([cache, *(value for name, value in output.items() if name in CACHE_KEYWORDS)])


def _nbytes(cache: Any) -> int:
    """Of all tensors of a cache, or of one layer's part of it."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors_in(cache)}.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a cache, however its layers keep them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, EncoderDecoderCache):
        yield from tensors_in([value.self_attention_cache, value.cross_attention_cache])
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "layers"):
        yield from tensors_in([vars(layer) for layer in value.layers])
