"""This reads the sizes that the formulas need from a config of transformers, whatever it calls them.

It refuses to know what they are for: the formulas are in `formulas.py`.
"""

from __future__ import annotations

from typing import Any

from airstream.compat.config_names import (
    LAYER_COUNTS,
    MLP_WIDTHS,
    POSITION_COUNTS,
    ROUTED_COUNTS,
    config_value,
    first_count,
    head_count,
    head_width,
    hidden_size,
)
from airstream.compat.traits import CacheSize
from airstream.footprint.formulas import HIDDEN_COPIES, Footprint
from airstream.footprint.growth import PassGrowth

PATCHES_OF_AN_IMAGE = 1024
"""Where images may have any size."""


def footprint(
    config: Any,
    item_bytes: int,
    eager_attention: bool,
    head_copy_bytes: int = 0,
    head_copy_bytes_each: int = 0,
    cache: CacheSize | None = None,
    has_head: bool = True,
    passes: tuple[PassGrowth, ...] = (),
) -> Footprint:
    """The footprint of a model with this transformers config, computing in elements of `item_bytes`.

    Args:
        cache: its size, where that has been measured; else it is computed from the config.
        has_head: it computes logits over the vocabulary.
        passes: how they grow, where that has been measured.
    """
    text = config.get_text_config(decoder=True)
    hidden, heads = hidden_size(text), head_count(text)
    layers = first_count(text, *LAYER_COUNTS, default=1)
    intermediate = first_count(text, *MLP_WIDTHS, default=4 * hidden)
    routed = first_count(text, *ROUTED_COUNTS, default=0)
    routed *= first_count(text, "moe_intermediate_size", default=intermediate)
    per_layer = _kv_elements_per_layer(text, heads)
    if config_value(config, "is_encoder_decoder"):
        per_layer *= 2  # of the sequence that is written, and of the one that was read
    pixel_bytes, image_values = _of_images(config, item_bytes, hidden)
    return Footprint(
        item_bytes=item_bytes,
        hidden_size=hidden,
        intermediate_size=max(intermediate, routed),
        num_heads=heads,
        kv_elements=layers * per_layer if cache is None else cache.per_token,
        kv_elements_per_layer=per_layer if cache is None else -(-cache.per_token // layers),
        state_elements=0 if cache is None else cache.per_sequence,
        vocab_size=first_count(text, "vocab_size", "n_words", default=1),
        has_head=has_head,
        pixel_bytes=pixel_bytes,
        image_values=image_values,
        max_position=first_count(text, *POSITION_COUNTS, default=1 << 20),
        eager_attention=eager_attention,
        head_copy_bytes=head_copy_bytes,
        head_copy_bytes_each=head_copy_bytes_each,
        num_layers=layers,
        passes=passes,
    )


def _kv_elements_per_layer(text: Any, heads: int) -> int:
    if first_count(text, "kv_lora_rank", default=0):  # multi-head latent attention: the latents are what is cached
        return first_count(text, "kv_lora_rank", default=0) + first_count(text, "qk_rope_head_dim", default=0)
    kv_heads = first_count(text, "num_key_value_heads", "num_kv_heads", default=heads)
    if config_value(text, "new_decoder_architecture"):  # Falcon 40B and 180B repeat keys and values before caching
        kv_heads = heads
    elif config_value(text, "multi_query"):  # Falcon 7B, StarCoder
        kv_heads = 1
    return 2 * kv_heads * head_width(text)


def _of_images(config: Any, item_bytes: int, width: int) -> tuple[float, int]:
    """Activations of the vision tower for each number of an image, and how many of them an image has; 0 without one.

    Args:
        width: of the text model, which the tower has if its config does not say.
    """
    vision = config_value(config, "vision_config")
    if vision is None:
        return 0.0, 0
    hidden = first_count(vision, "hidden_size", "embed_dim", "d_model", default=width)
    intermediate = first_count(vision, "intermediate_size", "mlp_dim", "ffn_dim", default=4 * hidden)
    side = first_count(vision, "patch_size", "spatial_patch_size", default=14)
    patch = 3 * side**2 * first_count(vision, "temporal_patch_size", default=1)
    size = first_count(vision, "image_size", default=0)
    per_value = item_bytes * (1 + (HIDDEN_COPIES * hidden + 3 * intermediate) / patch)
    return per_value, 3 * size**2 if size else PATCHES_OF_AN_IMAGE * patch
