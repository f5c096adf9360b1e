"""This reads off the arguments of a call what it asks for: how many sequences, how long.

It knows the arguments of transformers. It refuses to know memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from airstream.compat.traits import CACHE_KEYWORDS, cache_capacity, cached_tokens
from airstream.plan.request import Workload

UNNAMED_NEW_TOKENS = 20
"""What transformers generates if neither the call nor the checkpoint says how much."""


def of_pass(args: Sequence[Any], kwargs: Mapping[str, Any], config: Any = None) -> Workload | None:
    """The workload of a forward pass with these arguments; None if they do not say. `config` is the model's.

    Where an encoder and a decoder work, their sequences are taken to be as long as the longer one of them.
    """
    source = _inputs(args, kwargs)
    target = _first_tensor(kwargs, "decoder_input_ids", "decoder_inputs_embeds")
    inputs = source if target is None else target
    if inputs is None or inputs.dim() < 2:
        return None
    batch_size, tokens = inputs.shape[0], inputs.shape[1]
    past = _cache(kwargs)
    logits = _kept_positions(kwargs.get("logits_to_keep", 0), tokens)
    context = tokens + (0 if past is None else cached_tokens(past))
    if source is not None:
        tokens = max(tokens, source.shape[1])
    context = max(context, tokens, _encoded_tokens(kwargs), 0 if past is None else cache_capacity(past))
    return Workload(
        batch_size,
        context,
        tokens,
        logits,
        _pixel_values(kwargs),
        is_padded=tokens > 1 and _is_padded(kwargs),
        has_labels=kwargs.get("labels") is not None,
        keeps_states=_is_on("output_hidden_states", kwargs, config),
        keeps_attentions=_is_on("output_attentions", kwargs, config),
    )


def _kept_positions(keep: Any, tokens: int) -> int:
    """How many of `tokens` positions get logits: the last `keep`, or those that it names as an index would."""
    if isinstance(keep, torch.Tensor):
        return keep.numel()
    if isinstance(keep, int | slice):
        return len(range(tokens)[keep if isinstance(keep, slice) else slice(-keep, None)])
    return len(keep) if isinstance(keep, Sequence) else tokens


def of_generation(
    defaults: Any, is_encoder_decoder: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Workload | None:
    """The workload of `generate(*args, **kwargs)`: the prompt's pass, with the KV cache of the end; None if unknown.

    Args:
        defaults: the model's generation config.
        is_encoder_decoder: what is generated does not follow the prompt, but begins anew.
    """
    inputs = _inputs(args, {"input_ids": kwargs.get("inputs"), **kwargs})
    if inputs is None or inputs.dim() < 2:
        return None
    config = _given_config(args, kwargs) or defaults

    def option(name: str) -> int:
        value = kwargs.get(name, getattr(config, name, None))
        return value if isinstance(value, int) else 0

    sequences = inputs.shape[0] * max(option("num_beams"), option("num_return_sequences"), 1)
    past = 0 if is_encoder_decoder else _past_tokens(kwargs)
    prompt_tokens, new_tokens = _whole_tokens(kwargs, inputs.shape[1], past), option("max_new_tokens")
    before = 0 if is_encoder_decoder else prompt_tokens
    if not new_tokens:
        new_tokens = max(option("max_length") - before, UNNAMED_NEW_TOKENS)
    tokens = max(prompt_tokens - past, 1)
    return Workload(
        sequences,
        context=max(before + new_tokens, prompt_tokens),
        tokens=min(option("prefill_chunk_size") or tokens, tokens),
        logits=1,
        pixel_values=_pixel_values(kwargs),
        prompt=prompt_tokens,
        is_padded=_is_padded(kwargs),
        keeps_states=_is_on("output_hidden_states", kwargs, config),
        keeps_attentions=_is_on("output_attentions", kwargs, config),
        keeps_scores=_is_on("output_scores", kwargs, config) + _is_on("output_logits", kwargs, config),
    )


def accepted_tokens(
    result: Any, is_encoder_decoder: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> int | None:
    """How many tokens a generation gave each sequence: its `result` has the ids of the prompt, too. None if not."""
    ids, sequences = _inputs(args, {"input_ids": kwargs.get("inputs"), **kwargs}), getattr(result, "sequences", result)
    if is_encoder_decoder or ids is None or kwargs.get("inputs_embeds") is not None:
        return None
    if ids.dim() != 2 or not isinstance(sequences, torch.Tensor) or sequences.dim() != 2:
        return None  # some models give several codes for a step
    prompt = sequences[0, : ids.shape[1]]
    return sequences.shape[1] - ids.shape[1] if torch.equal(prompt, ids[0].to(prompt.device)) else None


def is_draft(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether `generate(*args, **kwargs)` is asked for a draft, which another generation checks."""
    return bool(getattr(_given_config(args, kwargs), "is_assistant", False))


def asks_for_length(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether `generate(*args, **kwargs)` says itself how long it may get, rather than the checkpoint."""
    return _given_config(args, kwargs) is not None or any(
        kwargs.get(name) is not None for name in ("max_new_tokens", "max_length")
    )


def _is_on(name: str, kwargs: Mapping[str, Any], config: Any) -> bool:
    """Whether an output is asked for, in the call or else in the config."""
    asked = kwargs.get(name)
    return bool(getattr(config, name, False) if asked is None else asked)


def _given_config(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)


def _past_tokens(kwargs: Mapping[str, Any]) -> int:
    """How many tokens are in the cache that a generation goes on with."""
    past = _cache(kwargs)
    return 0 if past is None else cached_tokens(past)


def _whole_tokens(kwargs: Mapping[str, Any], given: int, past: int) -> int:
    """The prompt's length with what is in the cache: a call may repeat that, or give only what is new."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return max(mask.shape[1], given)
    return given if given > past else past + given


def _is_padded(kwargs: Mapping[str, Any]) -> bool:
    """Whether a mask hides tokens. Waits for the device, as transformers does to find that out."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor):
        return mask is not None
    return mask.dim() != 2 or mask.is_meta or not bool(mask.all())


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
