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
    frames = next((size for name in FRAMES if (size := getattr(vision, name, None))), 1)
    width = 3 * frames * vision.patch_size**2
    return {"pixel_values": random(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}


FRAMES = ("temporal_patch_size", "patch_temporal")
"""What configs call the number of frames that a patch is of."""


def aspect_ratios(model: Any) -> Inputs:
    """One picture of one tile, of the two that there may be."""
    return {
        "pixel_values": random(1, 1, 2, 3, *_size(model)),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
        "cross_attention_mask": torch.tensor([1, 0]).expand(1, 12, 1, 2).clone(),
    }


def _size(model: Any) -> tuple[int, int]:
    vision = getattr(model.config, "vision_config", None)
    size = getattr(getattr(vision, "sam_config", vision), "image_size", None) or 16
    return (size, size) if isinstance(size, int) else tuple(size)


def seen(model: Any, images: Inputs) -> Inputs:
    """A prompt with as many image tokens as the model makes of `images`."""
    count = _count(features_of(model)(**in_dtype(images, model.dtype)))
    token = next(value for name in IMAGE_TOKENS if (value := getattr(model.config, name, None)) is not None)
    ids = random_ids(1, 12)
    ids = torch.cat([ids[:, :4], torch.full((1, count), token), ids[:, 4:]], dim=1)
    inputs = {"input_ids": ids, **images}
    accepted = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in accepted:
            inputs[name] = (ids == token).long()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = random_ids(1, 5, seed=3)
    return inputs


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """What a model of `dtype` is given: `value`, the floating-point numbers in it rounded."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: in_dtype(each, dtype) for key, each in value.items()}
    return tuple(in_dtype(each, dtype) for each in value) if isinstance(value, tuple) else value


def features_of(model: Any) -> Callable[..., Any]:
    """What makes features of pictures, or of films."""
    names = ("get_image_features", "get_video_features")
    return next(getattr(part, name) for name in names for part in model.modules() if hasattr(part, name))


IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_index")
"""What the token is called that stands for a picture; some models know films only."""


def _count(features: Any) -> int:
    """How many tokens `features`, as a model gives them, take the place of."""
    deepstack = getattr(features, "deepstack_features", None)
    pooled = getattr(features, "pooler_output", features)
    if pooled is None:
        pooled = features.last_hidden_state if deepstack is None else deepstack[0][1]
    rows = [pooled] if isinstance(pooled, torch.Tensor) else list(pooled)
    return sum(row.numel() // row.shape[-1] for row in rows)


def square_patches(model: Any) -> Inputs:
    """Four by four patches of a picture, not flat."""
    size = model.config.vision_config.patch_size
    return {"pixel_values": random(16, 3, size, size), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def patches_in_a_grid(model: Any) -> Inputs:
    """Four by four patches of a picture, flat, and how many in a column and a row."""
    return {"pixel_values": patches(model)["pixel_values"], "image_grid_hw": torch.tensor([[4, 4]])}


def merged_squares(model: Any) -> Inputs:
    """Two by two squares of patches, channels last."""
    size = 2 * model.config.vision_config.patch_size
    return {"pixel_values": random(4, size, size, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}


def cubes(model: Any) -> Inputs:
    """Four patches of two frames each, channels last."""
    size = model.config.vision_config.patch_size
    return {"pixel_values": random(4, 2, size, size, 3)}


def row_of_patches(model: Any) -> Inputs:
    """Four by four patches of a picture, side by side."""
    size = model.config.vision_config.patch_size
    return {"pixel_values": random(1, 3, size, 16 * size), "target_sizes": torch.tensor([[4, 4]])}


def pooled_patches(model: Any) -> Inputs:
    """Four by four patches of a picture, and which four of them make a token."""
    numbers = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return {
        "pixel_values": random(1, 16, 3 * model.config.vision_config.patch_size**2),
        "image_token_pooling": numbers,
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


def merged_patches(model: Any) -> Inputs:
    """Patches, and how many of them make a token."""
    return patches(model) | {"image_merge_sizes": torch.tensor([2])}


def two_sizes(model: Any) -> Inputs:
    """One picture, in the sizes of both vision towers."""
    size = model.config.high_res_vision_config.image_size
    return picture(model) | {"high_res_pixel_values": random(1, 3, size, size)}


def shaped_patches(model: Any) -> Inputs:
    """Four by four patches of a picture, flat, all of them real."""
    return {
        "pixel_values": random(1, 16, 3 * model.config.vision_config.patch_size**2),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


def bare_patches(model: Any) -> Inputs:
    """Sixteen patches of a picture, flat."""
    return {"pixel_values": random(1, 16, 3 * model.config.patch_size**2)}


def whole_tiles(model: Any) -> Inputs:
    """One picture, one tile."""
    return pictures(model) | {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def asked(model: Any) -> Inputs:
    """A picture, and a question to the queries that look at it."""
    return picture(model) | {"qformer_input_ids": random_ids(1, 4, seed=3)}


def film_asked(model: Any) -> Inputs:
    """Four pictures, one after the other, and a question."""
    return {"pixel_values": random(1, 4, 3, *_size(model)), "qformer_input_ids": random_ids(1, 4, seed=3)}


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


def attended(model: Any) -> Inputs:
    """A picture that every word looks at."""
    return text(model) | pictures(model) | {"image_attention_mask": torch.ones(1, 12, 1, dtype=torch.long)}


def in_places(model: Any) -> Inputs:
    """A picture whose queries take the place of some words."""
    places = torch.zeros(1, 12, dtype=torch.long)
    places[:, 2 : 2 + model.config.latent_query_num] = 1
    return text(model) | picture(model) | {"image_embeds_position_mask": places}


def numbered_patches(model: Any) -> Inputs:
    """Patches of a picture, each after its row and its column."""
    places = 1.0 + torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    width = model.config.vision_config.patch_embed_hidden_size
    return {"flattened_patches": torch.cat([places, random(1, 16, width)], dim=-1)}


def numbered_patches_in_places(model: Any) -> Inputs:
    inputs = in_places(model) | numbered_patches(model)
    del inputs["pixel_values"]
    return inputs


def numbered_patches_described(model: Any) -> Inputs:
    return numbered_patches(model) | {"decoder_input_ids": random_ids(1, 5)}


def action(model: Any) -> Inputs:
    """A picture, what a robot is to do, its state, and the noise that becomes its next moves."""
    config = model.config
    ids = torch.cat([torch.full((1, 16), config.vlm_config.image_token_id), random_ids(1, 12)], dim=1)
    return {
        "input_ids": ids,
        "pixel_values": random(1, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
        "attention_mask": torch.ones_like(ids),
        "state": random(1, config.max_state_dim, seed=3),
        "noise": random(1, config.chunk_size, config.max_action_dim, seed=4),
        "timestep": torch.tensor([0.5]),
    }


def page(model: Any) -> Inputs:
    """Words, each in its box of a picture, and the beginning of what is said of them."""
    boxes = torch.rand(1, 12, 4, generator=torch.Generator().manual_seed(4)).sort(-1).values
    return source_and_target(model) | {"bbox": boxes, "pixel_values": random(1, 3, 16, 16)}


def aspect_ratios_beside(model: Any) -> Inputs:
    return text(model) | aspect_ratios(model)


def images_of(model_type: str, model: Any) -> Inputs:
    """A picture, as this type wants it."""
    if model_type in IMAGES:
        return IMAGES[model_type](model)
    accepted = inspect.signature(features_of(model)).parameters
    return patches(model) if "image_grid_thw" in accepted else picture(model)


IMAGES: Mapping[str, Callable[[Any], Inputs]] = {
    "idefics2": pictures, "idefics3": pictures, "smolvlm": pictures, "granite_docling": whole_tiles,
    "llava_next": tiles, "llava_next_video": tiles, "llava_onevision": tiles,
    "mistral3": sized, "mistral_large4": sized, "lighton_ocr": sized,
    "gemma4": flat_patches, "gemma4_unified": flat_patches,
    "instructblip": asked, "instructblipvideo": film_asked, "emu3": sized, "granite4_vision": tiles,
    "kimi_k25": square_patches, "paddleocr_vl": square_patches, "molmo2": pooled_patches,
    "minicpmv4_6": row_of_patches, "minicpmv4_7": row_of_patches, "minicpm_ocr": row_of_patches,
    "video_llama_3": merged_patches, "nemotron_h_omni": patches_in_a_grid, "apertus1p5": sized,
    "inkling2": merged_squares, "inkling2_loop": merged_squares, "inkling_mm_model": cubes,
    "deepseek_vl_hybrid": two_sizes, "lfm2_vl": shaped_patches, "fuyu": bare_patches, "diffusion_gemma": flat_patches,
}  # fmt: skip
"""How a type gets a picture that tokens of the prompt stand for, where it is not as usual."""

WITH_IMAGES: Mapping[str, Callable[[Any], Inputs]] = {
    "mllama": aspect_ratios_beside, "blip": beside, "git": beside, "vision-encoder-decoder": described,
    "idefics": attended, "kosmos-2": in_places, "kosmos-2.5": numbered_patches_in_places,
    "pix2struct": numbered_patches_described, "udop": page,
    "pp_formulanet": described, "pi0": action,
}  # fmt: skip
"""Types that see a picture otherwise."""

TEXT_ALONE = {"mistral4"}
"""Types that get no picture here."""

NEVER_ALONE = {"blip-2", "instructblip", "instructblipvideo"}
"""Types that take no text without a picture."""


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
        with_image = seen(model, images_of(model_type, model))
        words = source_and_target(model) if model.config.is_encoder_decoder else text(model)
        return [with_image] if model_type in NEVER_ALONE else [with_image, words]
    if auto_class == "AutoModelForSpeechSeq2Seq":
        return [sound_and_target(model)]
    if auto_class == "AutoModel" and model_type in ("clip", "siglip"):
        return [beside(model)]
    if auto_class == "AutoModelForSeq2SeqLM" or (auto_class == "AutoModel" and model.config.is_encoder_decoder):
        return [source_and_target(model)]
    return [text(model)] if model_type in ONE_SEQUENCE else [text(model), padded(model)]


def batch_of(auto_class: str, model_type: str, model: Any) -> Inputs | None:
    """Two sequences, the second one padded on the left, of types that write of words alone; None for others."""
    if auto_class == "AutoModelForCausalLM" and model_type not in {*SPECIAL_INPUTS, *ONE_SEQUENCE}:
        return padded(model)
    if auto_class == "AutoModelForSeq2SeqLM":
        return padded(model) | {"decoder_input_ids": random_ids(2, 5, seed=3)}
    is_text = auto_class == "AutoModelForImageTextToText" and model_type not in NEVER_ALONE
    return padded(model) if is_text and not model.config.is_encoder_decoder else None
