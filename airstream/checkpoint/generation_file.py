"""This checks generation_config.json. transformers computes with whatever is there, and fails later.

It knows which fields there are and of which types their values can be. It refuses to know which values go together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from airstream.checkpoint.config_file import check_types, read_object
from airstream.errors import CheckpointError

_WHOLE, _NUMBER, _FLAG, _IDS = (int,), (int, float), (bool, int), (int, list)
IDS = (
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id",
)  # fmt: skip
GENERATION: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "top_k",
            "num_return_sequences", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_beam_groups",
            "num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
            "assistant_lookbehind", "target_lookbehind", "prefill_chunk_size", "max_cache_len",
        ),
        _WHOLE,
    ),
    **dict.fromkeys(
        (
            "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
            "encoder_repetition_penalty", "length_penalty", "guidance_scale", "diversity_penalty", "penalty_alpha",
            "max_time", "assistant_confidence_threshold", "assistant_ensemble_weight",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(
        (
            "do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "output_attentions",
            "token_healing", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
            "low_memory", "disable_compile", "use_mtp",
        ),
        _FLAG,
    ),
    **dict.fromkeys(IDS, _IDS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), (list,)),
    "exponential_decay_length_penalty": (list,),
    **dict.fromkeys(("cache_implementation", "num_assistant_tokens_schedule"), (str,)),
    "early_stopping": (bool, int, str),
    "stop_strings": (str, list),
}  # fmt: skip
"""What may be said, and of which types; null may be said of anything."""


NEVER = ("constraints", "force_words_ids", "dola_layers", "is_assistant")
"""What a caller may ask for, who has the code or the models that it takes. No file can have them."""

MAX_LAYERS, MAX_NGRAM, MAX_NUMBER = 1_000, 1 << 16, 1 << 63

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is one, and what was expected, in words."""


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_NUMBER


def _are_ids(value: Any) -> bool:
    return bool(value) and all(map(_is_id, value))


def _up_to(most: int) -> Check:
    return lambda value: 1 <= value <= most, f"a number from 1 to {most:,}"


_ONE_OR_MORE: Check = (lambda value: 1 <= value < MAX_NUMBER, "a number from 1")
_PENALTY: Check = (lambda value: value == 1 or (type(value) is float and value > 0), "a number with a point, above 0")
_FORCED: Check = (lambda value: _is_id(value) or (type(value) is list and _are_ids(value)), "one or more ids of tokens")

CHECKS: Mapping[str, Check] = {
    **dict.fromkeys(
        ("num_beams", "num_return_sequences", "prefill_chunk_size", "prompt_lookup_num_tokens"), _ONE_OR_MORE
    ),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), _PENALTY),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), _FORCED),
    **dict.fromkeys(
        ("suppress_tokens", "begin_suppress_tokens"),
        (lambda value: all(type(token) is int for token in value), "a list of ids of tokens"),
    ),
    "encoder_no_repeat_ngram_size": (lambda value: value <= MAX_NGRAM, f"at most {MAX_NGRAM:,}"),
    "max_matching_ngram_size": _up_to(MAX_NGRAM),
    "assistant_early_exit": _up_to(MAX_LAYERS),
    "bad_words_ids": (
        lambda value: bool(value) and all(type(word) is list and _are_ids(word) for word in value),
        "a list of lists of ids of tokens",
    ),
    "sequence_bias": (
        lambda value: bool(value) and all(_is_bias(pair) for pair in value),
        "a list of pairs: ids of tokens, and a number with a point",
    ),
    "exponential_decay_length_penalty": (
        lambda value: len(value) == 2 and _is_id(value[0]) and type(value[1]) in (int, float),
        "a number of tokens and a factor",
    ),
    "stop_strings": (
        lambda value: type(value) is str or all(type(text) is str for text in value),
        "a text or a list of texts",
    ),
}
"""What a value that has its type has to be besides, lest every generation fails with it, or never begins."""


def _is_bias(pair: Any) -> bool:
    return (
        type(pair) is list and len(pair) == 2 and type(pair[0]) is list and _are_ids(pair[0]) and type(pair[1]) is float
    )


def read_generation_file(file: Path) -> dict[str, Any]:
    """What generation_config.json says. Values of types that it cannot have are refused.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `read_config_file`.
    """
    config = read_object(file)
    _check(file, config)
    return config


def check_ids(file: Path) -> None:
    """Refuse a config.json, which says of generation what another file does not, if its ids of tokens are none.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `read_config_file`.
    """
    config = read_object(file)
    _check(file, {name: config[name] for name in config.keys() & set(IDS)})


def _check(file: Path, config: Mapping[str, Any]) -> None:
    check_types(file, config, GENERATION)
    for name, value in config.items():
        if value is not None and (expected := _unmet(name, value)):
            raise CheckpointError(f"{file}: {name} is {str(value)[:100]}; {expected} was expected")


def _unmet(name: str, value: Any) -> str:
    """What was expected of a value and is not so; "" if all is well."""
    if name in NEVER:
        return "" if value is False else "nothing"
    if isinstance(value, int | float) and not abs(value) < (MAX_NUMBER if type(value) is int else math.inf):
        return "a number of 64 bits"
    if GENERATION.get(name) is _IDS and isinstance(value, list) and not (value and all(type(i) is int for i in value)):
        return "a list of whole numbers"
    is_met, expected = CHECKS.get(name, (lambda _: True, ""))
    return "" if is_met(value) else expected
