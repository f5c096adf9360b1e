"""What a model tells of itself once it is built: its attention, its KV cache."""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache, PreTrainedModel

CACHE_KEYWORDS = ("cache", "past_key_values")
"""What forward passes call the KV cache, newest name first."""


def uses_eager_attention(model: PreTrainedModel) -> bool:
    """Whether attention scores are materialised."""
    return bool(model.config._attn_implementation == "eager")


def cache_keyword(model: PreTrainedModel) -> str:
    """What `model` calls the KV cache among its arguments: "cache" from transformers 5.24 on."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_KEYWORDS if name in accepted), CACHE_KEYWORDS[-1])


def measure_kv_elements(model: PreTrainedModel) -> int | None:
    """Elements that one token adds to the KV cache, found by a forward pass on the meta device; None if that fails.

    Exact where formulas are not: latent attention, shared and sliding layers, heads repeated before they are cached.
    """
    tokens = 2
    cache = DynamicCache(config=model.config)
    try:
        with torch.no_grad():
            ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
            model.base_model(input_ids=ids, use_cache=True, **{cache_keyword(model.base_model): cache})
    except Exception:  # any model's code may look at values, which do not exist here: then formulas have to do
        return None
    tensors = (value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor))
    return -(-sum(tensor.numel() for tensor in tensors) // tokens) or None
