"""generation_config.json before anybody believes it: transformers computes with whatever is there, and fails later.

Knows which fields there are and of which types their values can be. Refuses to know which values go together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airstream.checkpoint.config_file import check_types, read_object
from airstream.errors import CheckpointError

_WHOLE, _NUMBER, _FLAG, _IDS = (int,), (int, float), (bool, int), (int, list)
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
            "low_memory", "is_assistant", "disable_compile",
        ),
        _FLAG,
    ),
    **dict.fromkeys(
        (
            "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id",
            "forced_eos_token_id",
        ),
        _IDS,
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), (list, dict)),
    **dict.fromkeys(("cache_implementation", "num_assistant_tokens_schedule"), (str,)),
    "early_stopping": (bool, int, str),
    "stop_strings": (str, list),
}  # fmt: skip
"""What may be said, and of which types; null may be said of anything."""


def read_generation_file(file: Path) -> dict[str, Any]:
    """What generation_config.json says. Values of types that it cannot have are refused.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `read_config_file`.
    """
    config = read_object(file)
    check_types(file, config, GENERATION)
    for name, types in GENERATION.items():
        value = config.get(name)
        if types is _IDS and isinstance(value, list) and not all(type(item) is int for item in value):
            raise CheckpointError(f"{file}: {name} is {str(value)[:100]}; a list of whole numbers was expected")
    return config
