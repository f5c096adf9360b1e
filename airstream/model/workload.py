"""What a call of the model asks for, read off its arguments: how many sequences, how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from airstream.compat import CACHE_KEYWORDS, cached_tokens
from airstream.plan import Workload

UNNAMED_NEW_TOKENS = 20
"""What transformers generates if neither the call nor the checkpoint says how much."""


def of_pass(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Workload | None:
    """Of a forward pass with these arguments; None if they do not say.

    Where an encoder and a decoder work, their sequences are taken to be as long as the longer one of them.
    """
    source = _inputs(args, kwargs)
    target = _first_tensor(kwargs, "decoder_input_ids", "decoder_inputs_embeds")
    inputs = source if target is None else target
    if inputs is None or inputs.dim() < 2:
        return None
    batch_size, tokens = inputs.shape[0], inputs.shape[1]
    past = _cache(kwargs)
    keep = kwargs.get("logits_to_keep", 0)
    logits = keep.numel() if isinstance(keep, torch.Tensor) else keep or tokens
    context = tokens + (0 if past is None else cached_tokens(past))
    if source is not None:
        tokens = max(tokens, source.shape[1])
    context = max(context, tokens, _encoded_tokens(kwargs))
    return Workload(batch_size, context, tokens, logits, _pixel_values(kwargs))


def of_generation(
    defaults: Any, is_encoder_decoder: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Workload | None:
    """Of `generate(*args, **kwargs)`, its prompt's pass with the KV cache of its end; None if they do not say.

    Args:
        defaults: the model's generation config.
        is_encoder_decoder: what is generated does not follow the prompt, but begins anew.
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
    before = 0 if is_encoder_decoder else prompt_tokens
    if not new_tokens:
        new_tokens = max(option("max_length") - before, UNNAMED_NEW_TOKENS)
    context = max(before + new_tokens, prompt_tokens)
    return Workload.generation(sequences, context, prompt_tokens, _pixel_values(kwargs))


def has_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward pass with these arguments is given a KV cache."""
    return _cache(kwargs) is not None


def _cache(kwargs: Mapping[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE_KEYWORDS if kwargs.get(name) is not None), None)


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Token ids or embeddings, whichever the call has."""
    return _first_tensor({"args": args[0] if args else None, **kwargs}, "input_ids", "args", "inputs_embeds")


def _first_tensor(values: Mapping[str, Any], *names: str) -> torch.Tensor | None:
    return next((values[name] for name in names if isinstance(values.get(name), torch.Tensor)), None)


def _pixel_values(kwargs: Mapping[str, Any]) -> int:
    """How many numbers the images consist of, all together."""
    images = (kwargs.get(name) for name in ("pixel_values", "pixel_values_videos"))
    return sum(image.numel() for image in images if isinstance(image, torch.Tensor))


def _encoded_tokens(kwargs: Mapping[str, Any]) -> int:
    """How long the sequences are that an encoder has already read."""
    encoded = kwargs.get("encoder_outputs")
    hidden = encoded[0] if encoded else None
    return int(hidden.shape[1]) if isinstance(hidden, torch.Tensor) and hidden.dim() > 1 else 0
