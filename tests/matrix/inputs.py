"""What the tiny models are given: prompts, sequences for encoder and decoder, images as tensors."""

from __future__ import annotations

import inspect
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


def sound_and_target(model: Any) -> Inputs:
    """Features of a sound, as long as the encoder takes them, and the beginning of what is said."""
    if model.config.model_type == "whisper":
        features = random(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    else:
        features = random(1, 40, model.config.input_feat_per_channel)
    return {"input_features": features, "decoder_input_ids": random_ids(1, 5)}


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


def picture(model: Any) -> Inputs:
    """One picture, in the size of the vision tower."""
    return {"pixel_values": random(1, 3, *_size(model))}


def pictures(model: Any) -> Inputs:
    """One sequence with one picture."""
    return {"pixel_values": random(1, 1, 3, *_size(model))}


def tiles(model: Any) -> Inputs:
    """One picture as a whole and as a single tile."""
    return {"pixel_values": random(1, 2, 3, *_size(model)), "image_sizes": torch.tensor([_size(model)])}


def patches(model: Any) -> Inputs:
    """Four by four patches of a picture, flat, two frames of each."""
    vision = model.config.vision_config
    frames = getattr(vision, "temporal_patch_size", 1)
    width = 3 * frames * vision.patch_size**2
    return {"pixel_values": random(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def aspect_ratios(model: Any) -> Inputs:
    """One picture of one tile, of the two that there may be."""
    return {
        "pixel_values": random(1, 1, 2, 3, *_size(model)),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
        "cross_attention_mask": torch.tensor([1, 0]).expand(1, 12, 1, 2).clone(),
    }


def _size(model: Any) -> tuple[int, int]:
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None) or 16
    return (size, size) if isinstance(size, int) else tuple(size)


def seen(model: Any, images: Inputs) -> Inputs:
    """A prompt with as many image tokens as the model makes of `images`."""
    features = model.get_image_features(**images)
    features = getattr(features, "pooler_output", features)
    rows = [features] if isinstance(features, torch.Tensor) else list(features)
    count = sum(row.numel() // row.shape[-1] for row in rows)
    config = model.config
    token = next(getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name))
    ids = random_ids(1, 12)
    ids = torch.cat([ids[:, :4], torch.full((1, count), token), ids[:, 4:]], dim=1)
    inputs = {"input_ids": ids, **images}
    accepted = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in accepted:
            inputs[name] = (ids == token).long()
    return inputs


def flat_patches(model: Any) -> Inputs:
    """Sixteen patches of a picture with where they lie."""
    vision = model.config.vision_config
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    size = getattr(vision, "model_patch_size", vision.patch_size)
    return {"pixel_values": random(1, 16, 3 * size**2), "image_position_ids": places}


def sized(model: Any) -> Inputs:
    return picture(model) | {"image_sizes": torch.tensor([_size(model)])}


def beside(model: Any) -> Inputs:
    """A picture that no token of the prompt stands for."""
    return text(model) | picture(model)


def described(model: Any) -> Inputs:
    """A picture, and the beginning of what is said of it."""
    return picture(model) | {"decoder_input_ids": random_ids(1, 5)}


def aspect_ratios_beside(model: Any) -> Inputs:
    return text(model) | aspect_ratios(model)


def images_of(model_type: str, model: Any) -> Inputs:
    """A picture, as this type wants it."""
    if model_type in IMAGES:
        return IMAGES[model_type](model)
    accepted = inspect.signature(model.get_image_features).parameters
    return patches(model) if "image_grid_thw" in accepted else picture(model)


IMAGES: Mapping[str, Callable[[Any], Inputs]] = {
    "idefics2": pictures, "idefics3": pictures, "smolvlm": pictures, "granite_docling": pictures,
    "llava_next": tiles, "llava_next_video": tiles, "llava_onevision": tiles,
    "mistral3": sized, "mistral_large4": sized, "lighton_ocr": sized,
    "gemma4": flat_patches, "gemma4_unified": flat_patches,
}  # fmt: skip
"""How a type gets a picture that tokens of the prompt stand for, where it is not as usual."""

WITH_IMAGES: Mapping[str, Callable[[Any], Inputs]] = {
    "mllama": aspect_ratios_beside, "blip": beside, "git": beside, "vision-encoder-decoder": described,
}  # fmt: skip
"""Types that see a picture otherwise."""

TEXT_ALONE = {"mistral4", "deepseek_vl", "deepseek_vl_hybrid", "fuyu", "diffusion_gemma", "lfm2_vl"}
"""Types that get no picture here."""


SPECIAL_INPUTS: Mapping[str, Callable[[Any], Inputs]] = {
    "musicgen": codebooks,
    "musicgen_melody": codebooks,
    "gemma4_assistant": shared_states,
    "gemma4_unified_assistant": shared_states,
}
"""Types that want something else than a prompt."""


ONE_SEQUENCE = {"dory"}
"""Types whose attention does not take a padded batch, in transformers neither."""


def inputs_of(auto_class: str, model_type: str, model: Any) -> list[Inputs]:
    """The calls to compare; the first is generated from too."""
    if auto_class == "AutoModelForCausalLM" and model_type in SPECIAL_INPUTS:
        return [SPECIAL_INPUTS[model_type](model)]
    if auto_class == "AutoModelForImageTextToText" and model_type in WITH_IMAGES:
        return [WITH_IMAGES[model_type](model)]
    if auto_class == "AutoModelForImageTextToText" and model_type not in TEXT_ALONE:
        return [seen(model, images_of(model_type, model)), text(model)]
    if auto_class == "AutoModelForSpeechSeq2Seq":
        return [sound_and_target(model)]
    if auto_class == "AutoModel" and model_type in ("clip", "siglip"):
        return [beside(model)]
    if auto_class == "AutoModelForSeq2SeqLM" or (auto_class == "AutoModel" and model.config.is_encoder_decoder):
        return [source_and_target(model)]
    return [text(model)] if model_type in ONE_SEQUENCE else [text(model), padded(model)]
