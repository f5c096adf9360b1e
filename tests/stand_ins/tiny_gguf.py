"""Tiny random GGUF files of several architectures: a table of their metadata, and how one is written.

Weights are random blocks of the type that is asked for, in the shapes in which llama.cpp stores them, under the names
that transformers itself looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

HIDDEN, LAYERS, VOCAB_SIZE = 256, 2, 128
HALVES: Mapping[str, Sequence[int]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ2_XXS": (0,), "IQ3_S": (0,),
}  # fmt: skip
"""Where a block has its scales. Anything may be in the rest of it."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TinyGguf:
    """One architecture.

    Attributes:
        fields: metadata, without the name of the architecture in front.
        tied: there is no lm_head of its own.
        stored: what llama.cpp does to the shape of a weight, by a part of its name.
    """

    fields: dict[str, Any]
    tied: bool = False
    stored: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)


ATTENTION = {
    "context_length": 256,
    "block_count": LAYERS,
    "embedding_length": HIDDEN,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "vocab_size": VOCAB_SIZE,
}
EXPERTS = ATTENTION | {"expert_count": 4, "expert_used_count": 2}
GEMMA = ATTENTION | {"attention.key_length": 64, "attention.sliding_window": 8}
GPT2 = {
    "context_length": 256,
    "block_count": LAYERS,
    "embedding_length": HIDDEN,
    "feed_forward_length": 4 * HIDDEN,
    "attention.head_count": 4,
    "attention.layer_norm_epsilon": 1e-5,
}
MAMBA = {
    "context_length": 256,
    "block_count": LAYERS,
    "embedding_length": HIDDEN,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 32,
    "ssm.inner_size": 512,
    "vocab_size": VOCAB_SIZE,
}


def transposed(weights: Array) -> Array:
    return np.ascontiguousarray(weights.T)


TINY_GGUF: Mapping[str, TinyGguf] = {
    "llama": TinyGguf(ATTENTION | {"rope.dimension_count": 64}),
    "qwen2": TinyGguf(ATTENTION, tied=True),
    "qwen3": TinyGguf(ATTENTION),
    "qwen2moe": TinyGguf(EXPERTS, stored={"ffn_gate_inp_shexp": lambda weights: weights[0]}),
    "qwen3moe": TinyGguf(EXPERTS | {"attention.key_length": 64}),
    "gemma2": TinyGguf(GEMMA, tied=True),
    "gemma3": TinyGguf(GEMMA, tied=True),
    "gpt2": TinyGguf(
        GPT2,
        stored=dict.fromkeys(("attn_qkv.weight", "attn_output.weight", "ffn_up.w", "ffn_down.w"), transposed),
    ),
    "bloom": TinyGguf(GPT2 | {"vocab_size": VOCAB_SIZE}, tied=True),
    "stablelm": TinyGguf(ATTENTION | {"attention.layer_norm_epsilon": 1e-5}),
    "starcoder2": TinyGguf(ATTENTION | {"attention.layer_norm_epsilon": 1e-5}),
    "phi3": TinyGguf(ATTENTION),
    "lfm2": TinyGguf(
        ATTENTION | {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
        stored={"shortconv.conv.weight": lambda weights: weights[:, 0]},
    ),
    "mamba": TinyGguf(
        MAMBA,
        stored={"ssm_conv1d.weight": lambda weights: weights[:, 0], "ssm_a": lambda weights: -np.exp(weights)},
    ),
}


def write_tiny_gguf(
    name: str, file: Path, quant: str = "Q8_0", splits: int = 1, fields: Mapping[str, Any] | None = None
) -> Path:
    """Write architecture `name`, with matrices of type `quant` where their rows are whole blocks, to `file`.

    Args:
        splits: how many files it is split in; the first is returned.
        fields: metadata that says something else than the weights.
    """
    entry = TINY_GGUF[name]
    weights = _weights(name, file.with_name("header.gguf"))
    tensors = {key: _stored(entry, key, values, quant) for key, values in weights.items()}
    if splits == 1:
        return _write(name, file, tensors, fields=fields)
    files = [file.with_name(f"{file.stem}-{number:05}-of-{splits:05}.gguf") for number in range(1, splits + 1)]
    keys = list(tensors)
    for number, part in enumerate(files):
        some = {key: tensors[key] for key in keys[number::splits]}
        _write(name, part, some, split=(number, splits, len(keys)))
    return files[0]


def _weights(name: str, scratch: Path) -> dict[str, Array]:
    """Random weights in the shapes of the model, by their names in GGUF."""
    plain = np.zeros(1, np.float32), GGMLQuantizationType.F32
    tensors = {} if TINY_GGUF[name].tied else {"output.weight": plain}
    tensors |= {f"blk.0.{kind}": plain for kind in ("attn_q.bias", "ffn_norm.weight")}  # stablelm is known by these
    _write(name, scratch, tensors)
    config = AutoConfig.from_pretrained(scratch.parent, gguf_file=scratch.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if name == "lfm2":
        names = {_lfm2_name(key): key for key in model.state_dict()}
    else:
        names = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(name, TensorProcessor)(config={}))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    generator = np.random.default_rng(0)
    weights = {}
    for key, target in names.items():
        if key == "output.weight" and TINY_GGUF[name].tied:
            continue
        shape = shapes[target]
        if "_exps" in key:
            key = f"{key.removesuffix('.weight')}.weight"
            shape = (shape[0], shape[1] // 2, shape[2]) if "down" not in key else shape
        values = generator.standard_normal(shape, np.float32)
        weights[key] = values * np.float32(0.05) if len(shape) > 1 else 1 + values * np.float32(0.1)
    scratch.unlink()
    return weights


LFM2_NAMES = {
    "model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "lm_head": "output",
    "model.layers": "blk", "operator_norm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down", "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj",
    "conv.conv": "shortconv.conv",
}  # fmt: skip


def _lfm2_name(key: str) -> str:
    """Of an architecture whose names transformers has in another table."""
    for ours, theirs in LFM2_NAMES.items():
        if ours in key:
            key = key.replace(ours, theirs)
    return key


def _stored(entry: TinyGguf, key: str, values: Array, quant: str) -> tuple[Array, GGMLQuantizationType]:
    change = next((change for part, change in entry.stored.items() if part in key), None)
    values = np.ascontiguousarray(values if change is None else change(values))
    kind = GGMLQuantizationType[quant]
    elements, nbytes = GGML_QUANT_SIZES[kind]
    if values.ndim < 2 or values.shape[-1] % elements or "conv1d" in key or quant == "F32":
        return values, GGMLQuantizationType.F32
    if quant == "F16":
        return values.astype(np.float16), kind
    if quant == "BF16":
        bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8)
        return bits.numpy(), kind
    return random_blocks(quant, (*values.shape[:-1], values.shape[-1] // elements * nbytes)), kind


def random_blocks(quant: str, shape: tuple[int, ...]) -> Array:
    """Random blocks of type `quant` whose numbers are about as large as weights are; the last of `shape` is bytes."""
    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[quant]]
    generator = np.random.default_rng(shape[0])
    blocks = generator.integers(0, 256, (int(np.prod(shape)) // nbytes, nbytes), np.uint8)
    if quant == "MXFP4":
        blocks[:, 0] = generator.integers(118, 124, len(blocks))
    for start in HALVES.get(quant, ()):
        scale = np.float16(0.0001 if elements == 256 else 0.004) * generator.uniform(0.5, 1.5, len(blocks))
        blocks[:, start : start + 2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape)


def _write(
    name: str,
    file: Path,
    tensors: Mapping[str, tuple[Array, GGMLQuantizationType]],
    split: tuple[int, int, int] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Path:
    writer = GGUFWriter(file, name)
    for key, value in (TINY_GGUF[name].fields | (fields or {})).items():
        if isinstance(value, list):
            writer.add_array(f"{name}.{key}", value)
        else:
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{name}.{key}", value)
    _add_tokenizer(writer)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    for key, (values, kind) in tensors.items():
        writer.add_tensor(key, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: GGUFWriter) -> None:
    """Byte-level: three special tokens, then printable characters, then made-up words."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<pad>", "<s>", "</s>", "Ġ", *letters]
    tokens += [f"Ġ{letter}" for letter in letters[: VOCAB_SIZE - len(tokens)]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([f"Ġ {token[1:]}" for token in tokens if len(token) == 2 and token[0] == "Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
