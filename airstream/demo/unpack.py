"""This makes a dense bf16 checkpoint of the demo model's GGUF: weights, config, tokenizer, chat template.

It refuses to be a GGUF converter: it reads what that one file holds, and names what it does not know. It unpacks by
itself, not through transformers, so that the bytes do not depend on the transformers installed. The weights are those
that transformers reads, bit for bit; the tokenizer is better: as in llama.cpp, digits stand alone, while transformers'
conversion keeps a digit and the space before it together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from airstream.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["dense_model", "unpack"]

_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # in `tokenizer.ggml.token_type`


def dense_model(gguf_file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config of the tied llama model in `gguf_file`, as config.json has it, and its dense weights in bf16.

    Holds the dense weights once in host memory, and the largest tensor twice more in float32.

    Raises:
        CheckpointError: the file holds a tensor that such a model does not have.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    small = {name: field.contents() for name, field in reader.fields.items() if len(field.data) <= 1}  # no token lists
    return _config(small), _dense_tensors(reader, small)


def unpack(gguf_file: Path, folder: Path) -> None:
    """Write the tied llama model in `gguf_file` into the existing `folder` as a dense bf16 checkpoint.

    Holds the dense weights once in host memory, and the largest tensor twice more in float32.

    Raises:
        CheckpointError: the file holds a tensor that such a model does not have.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    save_file(_dense_tensors(reader, metadata), folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(metadata).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")
    for name, content in (
        ("config.json", _config(metadata)),
        ("generation_config.json", _token_ids(metadata)),
        ("tokenizer_config.json", _tokenizer_config(metadata)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _dense_tensors(reader: GGUFReader, metadata: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor under its Hugging Face name, unpacked in float32 as the format defines, then rounded to bf16."""
    from gguf.quants import dequantize

    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    tensors = {}
    for packed in reader.tensors:
        kind = packed.name.split(".")[-2]
        values = np.require(dequantize(packed.data, packed.tensor_type), requirements="W")  # float32: a read-only map
        weight = torch.from_numpy(values).to(torch.bfloat16)
        if kind in heads:  # rotary embedding turns rows in pairs: neighbours in GGUF, half a head apart in transformers
            weight = weight.reshape(heads[kind], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        tensors[_tensor_name(packed.name)] = weight
    return tensors


def _tensor_name(gguf_name: str) -> str:
    """`"blk.3.ffn_up.weight"` -> `"model.layers.3.mlp.up_proj.weight"`."""
    if gguf_name in _NAMES:
        return _NAMES[gguf_name]
    match gguf_name.split("."):
        case ["blk", index, kind, "weight"] if kind in _LAYER_NAMES:
            return f"model.layers.{index}.{_LAYER_NAMES[kind]}.weight"
    raise CheckpointError(f"tensor {gguf_name!r} is not one of a llama model with tied embeddings: not unpacked")


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "max_position_embeddings": metadata["llama.context_length"],
        # seven digits: the decimal that was meant (1e-05), not its float32 neighbour
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
        **_token_ids(metadata),
    }


def _token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{name}_token_id": metadata[f"tokenizer.ggml.{gguf_name}_token_id"] for name, gguf_name in names.items()}


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE in which every digit stands alone: what GGUF calls the pre-tokenizer "smollm"."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens, ids = metadata["tokenizer.ggml.tokens"], _token_ids(metadata)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
    }
