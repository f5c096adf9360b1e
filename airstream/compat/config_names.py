"""This knows what transformers' configs call the sizes of a model, each of which has many names.

It refuses to know what the sizes are for.
"""

from __future__ import annotations

from typing import Any

HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd", "dim")

HEAD_COUNTS = ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads")

HEAD_WIDTHS = ("head_dim", "kv_channels", "d_kv")
"""Where a config has none of them, the heads share the hidden size."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers")

MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "decoder_ffn_dim")

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""All experts of a layer."""

ROUTED_COUNTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
"""The experts of a layer that one token is routed to."""

POSITION_COUNTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""The longest context."""


def hidden_size(text: Any) -> int:
    """The numbers that layers of the language model hand on for each token."""
    return first_count(text, *HIDDEN_SIZES, default=1024)


def head_count(text: Any) -> int:
    """The heads of queries of a layer."""
    return first_count(text, *HEAD_COUNTS, default=1)


def head_width(text: Any) -> int:
    """The numbers of one head, of keys and of values."""
    return first_count(text, *HEAD_WIDTHS, default=hidden_size(text) // head_count(text))


def num_positions(config: Any) -> int:
    """The tokens that the model was made for; 0 if its config does not say."""
    return first_count(config.get_text_config(), *POSITION_COUNTS, default=0)


def first_count(config: Any, *names: str, default: int) -> int:
    """The first of the attributes that is a positive number: configs name one thing differently, or leave it None."""
    for name in names:
        value = config_value(config, name)
        if isinstance(value, int) and value > 0:
            return value
    return default


def config_value(config: Any, name: str) -> Any:
    """The attribute `name` of `config`, None if it has none; of layers that differ in it, the largest."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to say for all layers what is not the same in all of them
        values = [value for layer in config.per_layer_config if isinstance(value := getattr(layer, name, None), int)]
        return max(values, default=None)
