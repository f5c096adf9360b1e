"""Tiny random checkpoints of many architectures: a table of their configs, and how one is written.

Each is four layers deep and well under a megabyte, and still has what its architecture makes hard: merged experts,
tied weights, fused projections, buffers inside layers, two kinds of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "LLAMA",
    "TINY",
    "TinyModel",
    "VOCAB_SIZE",
    "tell_weights_apart",
    "tiny_tokenizer",
    "write_model",
    "write_tiny",
]

VOCAB_SIZE = 128
TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Everywhere the same, so that one tokenizer and one set of prompts serve all."""

LLAMA = TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
"""The names that most configs use, llama's first of all."""

TWO_ATTENTIONS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class TinyModel:
    """One architecture.

    Attributes:
        model_type: as in config.json.
        fields: what its config is made of.
        shard_bytes: the largest file of the checkpoint.
    """

    model_type: str
    fields: Mapping[str, Any]
    shard_bytes: int = 1 << 30


TINY: Mapping[str, TinyModel] = {
    "llama": TinyModel("llama", LLAMA | UNTIED),
    "llama-sharded": TinyModel("llama", LLAMA | UNTIED, shard_bytes=100_000),
    "llama-tied": TinyModel("llama", LLAMA | TIED),
    "qwen2": TinyModel("qwen2", LLAMA | UNTIED),
    "qwen3": TinyModel("qwen3", LLAMA | TIED | {"head_dim": 16}),
    "mistral": TinyModel("mistral", LLAMA | UNTIED | {"sliding_window": 8}),
    "gemma2": TinyModel("gemma2", LLAMA | TIED | TWO_ATTENTIONS | {"head_dim": 16}),
    "gemma3": TinyModel("gemma3_text", LLAMA | TIED | TWO_ATTENTIONS | {"head_dim": 16}),
    "phi3": TinyModel("phi3", LLAMA | UNTIED),
    "gpt2": TinyModel("gpt2", TOKENS | {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}),
    "opt": TinyModel(
        "opt",
        TOKENS
        | {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "falcon": TinyModel(
        "falcon", TOKENS | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_kv_heads": 2}
    ),
    "bloom": TinyModel("bloom", TOKENS | {"hidden_size": 64, "n_layer": 4, "n_head": 4}),
    "gpt_neox": TinyModel("gpt_neox", {**LLAMA, "num_key_value_heads": 4} | UNTIED),
    "qwen3_moe": TinyModel(
        "qwen3_moe",
        LLAMA | UNTIED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mixtral": TinyModel("mixtral", LLAMA | UNTIED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": TinyModel(
        "deepseek_v3",
        LLAMA
        | LATENT_ATTENTION
        | UNTIED
        | {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": TinyModel(
        "gpt_oss",
        LLAMA | UNTIED | TWO_ATTENTIONS | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def write_tiny(name: str, folder: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint `name` of the table, stored in `dtype`, and a tokenizer to `folder`."""
    write_model(TINY[name], folder, dtype)
    tiny_tokenizer().save_pretrained(folder)


def write_model(entry: TinyModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint of `entry`, always with the same weights, stored in `dtype`, to `folder`."""
    config = AutoConfig.for_model(entry.model_type, **entry.fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tell_weights_apart(model)
    model.save_pretrained(folder, max_shard_size=entry.shard_bytes)


@torch.no_grad()
def tell_weights_apart(model: torch.nn.Module) -> None:
    """Spread freshly initialised weights, so that outputs depend on every one of them.

    Matrices begin so small that all tokens get much the same logits, some of them as zeros; norms and biases begin all
    equal, so that two of them could change places unnoticed.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.dim() < 2:
            tensor.add_(torch.randn(tensor.shape).mul_(0.1).to(tensor.dtype))
        elif name in parameters and not tensor.any():
            tensor.copy_(torch.randn(tensor.shape).mul_(0.2))
        elif "embed" in name or "wte" in name:
            tensor.mul_(0.5)
        elif tensor.float().square().mean() < 0.5:
            tensor.mul_(10)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the vocabulary that all tiny models share: w3, w4, ... are words, the first three are special."""
    special = ["<pad>", "<s>", "</s>"]
    words = special + [f"w{number}" for number in range(len(special), VOCAB_SIZE)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
