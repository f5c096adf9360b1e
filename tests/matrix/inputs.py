"""What the tiny models are given: prompts, sequences for encoder and decoder, images as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Inputs = dict[str, Any]

FIRST_WORD, LAST_WORD = 16, 120
"""Of the vocabulary: what lies below is special to one type or another."""


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(FIRST_WORD, LAST_WORD, shape, generator=torch.Generator().manual_seed(seed))


def random(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(model: Any) -> Inputs:
    return {"input_ids": random_ids(1, 12)}


def padded(model: Any) -> Inputs:
    """Two prompts, the second one shorter, padded on the left."""
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def source_and_target(model: Any) -> Inputs:
    return {"input_ids": random_ids(1, 12), "decoder_input_ids": random_ids(1, 5, seed=3)}


def codebooks(model: Any) -> Inputs:
    """One sequence of audio codes, a row for every codebook."""
    return {"input_ids": random_ids(model.config.num_codebooks, 12)}


def shared_states(model: Any) -> Inputs:
    """What an assistant gets of the model it drafts for: hidden states, and the keys and values of its last layers."""
    text_config = model.config.get_text_config()
    states = {}
    for number, kind in enumerate(text_config.layer_types):
        layer = model.model.layers[number].self_attn
        shape = (1, text_config.per_layer_config[number].num_key_value_heads, 8, layer.head_dim)
        states[kind] = (random(*shape), random(*shape, seed=3))
    return {
        "inputs_embeds": random(1, 1, 2 * model.config.backbone_hidden_size),
        "position_ids": torch.tensor([[7]]),
        "shared_kv_states": states,
    }


SPECIAL_INPUTS: Mapping[str, Callable[[Any], Inputs]] = {
    "musicgen": codebooks,
    "musicgen_melody": codebooks,
    "gemma4_assistant": shared_states,
    "gemma4_unified_assistant": shared_states,
}
"""Types that want something else than a prompt."""


GENERATE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "musicgen": {"guidance_scale": 1.0},
    "musicgen_melody": {"guidance_scale": 1.0},
}
"""What `generate` wants to be told for some types."""


def inputs_of(auto_class: str, model_type: str, model: Any) -> list[Inputs]:
    """The calls to compare; the first is generated from too."""
    if model_type in SPECIAL_INPUTS and auto_class == "AutoModelForCausalLM":
        return [SPECIAL_INPUTS[model_type](model)]
    if auto_class == "AutoModelForSeq2SeqLM":
        return [source_and_target(model)]
    return [text(model), padded(model)]
