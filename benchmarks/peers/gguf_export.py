"""Write a Llama checkpoint of bf16 safetensors as a GGUF for llama.cpp: in bf16, or its layers in blocks of some type.

Knows plain Llama only (no rope scaling, no biases) and refuses the rest. Reads the safetensors files itself, so it
needs numpy and `gguf` but no torch. The vocabulary is a stand-in: llama.cpp will not load a model without one, and the
benchmark speaks token ids. Peak host memory: two tensors; the files are mapped, never loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Config = dict[str, Any]

_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def write_gguf(checkpoint: Path, out: Path, kind: str = "BF16") -> None:
    """Convert the checkpoint in the folder `checkpoint` to the file `out`, which appears only when complete. Blocks.

    `kind` is the type of the matrices of layers; the token embedding and the head stay in bf16.

    Raises:
        ValueError: the checkpoint is not plain Llama in bf16.
    """
    layers_type = gguf.GGMLQuantizationType[kind]
    config = _read_config(checkpoint)
    tensors = {gguf_name(name): (name, data) for name, data in read_tensors(checkpoint)}
    partial = out.with_name(f"{out.name}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_config(writer, config)
    _add_vocabulary(writer, config["vocab_size"])
    for new_name, (_, data) in tensors.items():
        stored = _type(new_name, data, layers_type)
        elements, nbytes = gguf.GGML_QUANT_SIZES[stored]
        if stored == gguf.GGMLQuantizationType.F32 or nbytes == 2:
            dtype, shape = np.dtype(np.float32 if data.ndim == 1 else np.uint16), data.shape
        else:  # the writer wants the bytes of a row
            dtype, shape = np.dtype(np.uint8), (len(data), data.shape[1] // elements * nbytes)
        writer.add_tensor_info(new_name, shape, dtype, data.size // elements * nbytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for new_name, (name, data) in tensors.items():
        writer.write_tensor_data(_packed(_converted(name, data, config), _type(new_name, data, layers_type)))
    writer.close()
    partial.rename(out)


def gguf_name(name: str) -> str:
    """The name that llama.cpp gives to a Llama tensor.

    Raises:
        ValueError: plain Llama has no such tensor.
    """
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    prefix, _, rest = name.removeprefix("model.layers.").partition(".")
    if not name.startswith("model.layers.") or rest not in _LAYER_NAMES:
        raise ValueError(f"tensor {name!r} is not one of plain Llama's")
    return f"blk.{prefix}.{_LAYER_NAMES[rest]}"


def read_tensors(checkpoint: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor of the folder's safetensors files: its name and its bf16 bits as a mapped uint16 array.

    Raises:
        ValueError: a tensor is not bf16.
    """
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"tensor {name!r} of {file.name} is {entry['dtype']}; only BF16 is converted")
            offset = 8 + header_bytes + entry["data_offsets"][0]
            yield name, np.memmap(file, np.uint16, "r", offset, tuple(entry["shape"]))


def permute(weight: Array, num_heads: int) -> Array:
    """Reorder the rows of a query or key projection, `(num_heads * head_dim, hidden)`.

    Hugging Face rotates the first half of a head against the second half, llama.cpp even rows against odd ones.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _read_config(checkpoint: Path) -> Config:
    config: Config = json.loads((checkpoint / "config.json").read_text())
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if config["model_type"] != "llama" or config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{checkpoint} is not a plain Llama: only that is converted to GGUF")
    return config | {
        "rope_theta": rope["rope_theta"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    }


def _add_config(writer: Any, config: Config) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])


def _add_vocabulary(writer: Any, size: int) -> None:
    """A SentencePiece vocabulary in form only: three control tokens, the 256 bytes, and made-up words."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    words = [f"word{number}" for number in range(size - len(special) - len(bytes_))]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + bytes_ + words)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * len(bytes_) + [kinds.NORMAL] * len(words)
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _type(new_name: str, data: Array, layers_type: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """How a tensor is stored. A norm becomes f32, which llama.cpp wants."""
    if data.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    return layers_type if new_name.startswith("blk.") else gguf.GGMLQuantizationType.BF16


def _packed(data: Array, stored: gguf.GGMLQuantizationType) -> Array:
    """bf16 bits as blocks of the type `stored`, rounded as llama.cpp rounds; what is plain, as it is."""
    if stored in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16):
        return data
    return gguf.quants.quantize(_as_floats(data), stored)


def _as_floats(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)  # bf16 is the upper half of f32


def _converted(name: str, data: Array, config: Config) -> Array:
    """The values to write for the tensor `name`: bf16 bits, or f32 for a norm."""
    if data.ndim == 1:
        return _as_floats(data)
    if name.endswith("q_proj.weight"):
        return permute(data, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return permute(data, config["num_key_value_heads"])
    return data
