"""What a call of the model asks for, read off its arguments: how many sequences, how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from airstream.compat import CACHE_KEYWORDS
from airstream.plan import Workload

UNNAMED_NEW_TOKENS = 20
"""What transformers generates if neither the call nor the checkpoint says how much."""


def of_pass(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Workload | None:
    """Of a forward pass with these arguments; None if they do not say."""
    inputs = _inputs(args, kwargs)
    if inputs is None:
        return None
    batch_size, tokens = inputs.shape[0], inputs.shape[1]
    past: Any = next((kwargs[name] for name in CACHE_KEYWORDS if kwargs.get(name) is not None), None)
    context = tokens + (past.get_seq_length() if hasattr(past, "get_seq_length") else 0)
    keep = kwargs.get("logits_to_keep", 0)
    return Workload(batch_size, context, tokens, keep.numel() if isinstance(keep, torch.Tensor) else keep or tokens)


def of_generation(defaults: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Workload | None:
    """Of `generate(*args, **kwargs)`, its prompt's pass with the KV cache of its end; None if they do not say.

    Args:
        defaults: the model's generation config.
    """
    inputs = _inputs(args, {"input_ids": kwargs.get("inputs"), **kwargs})
    if inputs is None or inputs.dim() < 2:
        return None
    config = kwargs.get("generation_config") or defaults

    def option(name: str) -> int:
        value = kwargs.get(name, getattr(config, name, None))
        return value if isinstance(value, int) else 0

    sequences = inputs.shape[0] * max(option("num_beams"), option("num_return_sequences"), 1)
    prompt_tokens, new_tokens = inputs.shape[1], option("max_new_tokens")
    if not new_tokens:
        new_tokens = max(option("max_length") - prompt_tokens, UNNAMED_NEW_TOKENS)
    return Workload.generation(sequences, prompt_tokens + new_tokens, prompt_tokens)


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Token ids or embeddings, whichever the call has."""
    candidates = (kwargs.get("input_ids"), *args[:1], kwargs.get("inputs_embeds"))
    return next((value for value in candidates if isinstance(value, torch.Tensor)), None)
