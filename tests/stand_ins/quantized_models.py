"""Tiny quantised checkpoints: quantised by transformers where it can on a CPU, else by hand in the hub's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.stand_ins.tiny_models import LLAMA, TINY, UNTIED, TinyModel, tiny_tokenizer, write_model

__all__ = [
    "BITSANDBYTES",
    "FP8_MODELS",
    "compressed_weights",
    "write_bitnet",
    "write_bitsandbytes",
    "write_compressed",
    "write_compressed_groups",
    "write_fp8",
    "write_integers",
    "write_mxfp4",
    "write_torchao",
]

BITSANDBYTES: Mapping[str, Mapping[str, Any]] = {
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-bf16-storage": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
"""By format, what `BitsAndBytesConfig` is given."""

FP8_MODELS = ("llama", "qwen3_moe", "deepseek_v3")
FP8_BLOCK = (8, 16)
"""Rows and columns that share a scale: small, because the models are."""

INTEGERS: Mapping[str, Mapping[str, Any]] = {
    "gptq 4-bit": {"quant_method": "gptq", "bits": 4, "sym": True},
    "gptq 4-bit act-order": {"quant_method": "gptq", "bits": 4, "desc_act": True},
    "gptq 8-bit v2": {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
    "gptq 3-bit": {"quant_method": "gptq", "bits": 3, "format": "gptq"},
    "gptq 2-bit": {"quant_method": "gptq", "bits": 2},
    "gptq 4-bit qwen3_moe": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    "awq qwen3_moe": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    "auto-round without offset": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round"},
}
"""By format, what its checkpoint says of itself."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which outputs a word of AWQ holds, lowest bits first."""

DENSE = "dense"
"""Folder in the folder of a checkpoint: the same weights, made dense by what wrote the checkpoint."""

GROUP_SIZE = 32
"""Columns that share a scale where only a part of a row does."""

LARGE = TinyModel(
    "llama",
    LLAMA
    | UNTIED
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
)
"""Layers of 32 MiB, in bfloat16: the kernel's count of a process's memory sees them."""


def write_bitsandbytes(name: str, folder: Path, variant: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The model `name`, quantised and saved by transformers in a format of `BITSANDBYTES`."""
    _quantize(name, folder, BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **BITSANDBYTES[variant]), dtype)


def write_torchao(folder: Path, settings: str) -> None:
    """A tiny llama, quantised by torchao as its config class `settings` says, and saved by transformers."""
    import torchao.quantization

    _quantize("llama", folder, TorchAoConfig(getattr(torchao.quantization, settings)()))


def write_compressed(folder: Path, num_bits: int) -> None:
    """A tiny llama with packed integers, as compressed-tensors lays them out: in groups of a row, or by whole rows."""
    write_compressed_groups(folder, {"group_0": {"targets": ["Linear"], "weights": compressed_weights(num_bits)}})


def compressed_weights(num_bits: int) -> dict[str, Any]:
    """What a scheme of compressed-tensors says of symmetric integers: 4 bits share scales in groups, others by rows."""
    shared = {"strategy": "group", "group_size": GROUP_SIZE} if num_bits == 4 else {"strategy": "channel"}
    return {"num_bits": num_bits, "type": "int", "symmetric": True, **shared}


def write_compressed_groups(folder: Path, groups: Mapping[str, Any]) -> None:
    """A tiny llama with packed integers, by schemes of compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    write_model(TINY["llama"], folder, torch.bfloat16)
    settings = {"config_groups": groups, "ignore": ["lm_head"], "format": "pack-quantized"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    apply_quantization_config(model, QuantizationConfig(**settings, quantization_status="frozen"))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            rows = module.weight.shape[0], module.weight_scale.shape[1], -1
            largest = module.weight.float().view(rows).abs().amax(-1)
            num_bits = module.quantization_scheme.weights.num_bits
            module.weight_scale.data = (largest / (2 ** (num_bits - 1) - 1)).to(module.weight_scale.dtype)
    config = QuantizationConfig(**settings, quantization_status="compressed")
    ModelCompressor(quantization_config=config).compress_model(model)
    described = json.loads(config.model_dump_json()) | {"quant_method": "compressed-tensors"}
    _save(folder, model.state_dict(), described)


def _quantize(name: str, folder: Path, settings: Any, dtype: torch.dtype = torch.bfloat16) -> None:
    entry = LARGE if name == "large" else TINY[name]
    write_model(entry, folder / "dense", dtype)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=settings, dtype=dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_fp8(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """The tiny model `name` as DeepSeek-V3 is stored: linear layers in FP8, with the inverse of a scale per block."""
    write_model(LARGE if name == "large" else TINY[name], folder, dtype)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() == 2 and ".layers." in key and "gate.weight" not in key:
            tensors[key], tensors[f"{key}_scale_inv"] = _in_fp8(tensor)
        else:
            tensors[key] = tensor
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": FP8_BLOCK}
    _save(folder, tensors, settings | {"modules_to_not_convert": ["gate", "lm_head"]})


def write_mxfp4(folder: Path) -> None:
    """A tiny gpt-oss as it is published: experts in blocks of 32 four-bit values with a common exponent."""
    write_model(TINY["gpt_oss"], folder, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, rows = tensors.pop(key).shape
        blocks = (experts, rows, width // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{key}_scales"] = torch.randint(120, 125, blocks, dtype=torch.uint8, generator=generator)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _save(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})


def write_integers(folder: Path, name: str) -> None:
    """A format of `INTEGERS`: random integers, zeros and scales in the hub's layout; in `DENSE` what they stand for."""
    settings = INTEGERS[name] | {"group_size": GROUP_SIZE}
    write_model(TINY["qwen3_moe" if "moe" in name else "llama"], folder, torch.float16)
    packed: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for key, tensor in load_file(folder / "model.safetensors").items():
        dense[key] = packed[key] = tensor
        if tensor.dim() == 2 and ".layers." in key and "gate.weight" not in key:
            dense[key], made = _in_integers(tensor, settings, generator)
            packed |= {key.removesuffix("weight") + end: value for end, value in made.items()}
            del packed[key]
    write_model(TINY["qwen3_moe" if "moe" in name else "llama"], folder / DENSE, torch.float16)
    save_file(dense, folder / DENSE / "model.safetensors", metadata={"format": "pt"})
    _save(folder, packed, settings)


def _in_integers(
    weight: torch.Tensor, settings: Mapping[str, Any], generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight of the size of values of `weight`, and the tensors that stand for it."""
    (outputs, inputs), bits = weight.shape, settings["bits"]
    groups = inputs // GROUP_SIZE
    integers = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator)
    zeros = torch.randint(1, 1 << bits, (outputs, groups), generator=generator)
    scales = (torch.rand(outputs, groups, generator=generator) * weight.abs().max() / (1 << bits)).half()
    group_of = torch.arange(inputs) // GROUP_SIZE
    if settings.get("desc_act"):
        group_of = group_of[torch.randperm(inputs, generator=generator)]
    dense = scales[:, group_of] * (integers - zeros[:, group_of])
    made = {"scales": scales.t()}
    if settings["quant_method"] == "awq":
        places = [eight + place for eight in range(0, outputs, 8) for place in AWQ_ORDER]
        made |= {"qweight": _words(integers.t()[:, places], bits), "qzeros": _words(zeros.t()[:, places], bits)}
        return dense, made
    is_offset = "v2" not in settings.get("checkpoint_format", "") and settings.get("packing_format") != "auto_round"
    made |= {"qweight": _words(integers, bits).t(), "qzeros": _words(zeros.t() - int(is_offset), bits)}
    if settings["quant_method"] == "gptq":
        made["g_idx"] = group_of.int()
    return dense, made


def _words(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row of `integers` as one string of bits, cut into words of 32."""
    string = (integers[:, :, None] >> torch.arange(bits) & 1).reshape(len(integers), -1, 32)
    return (string << torch.arange(32)).sum(-1).to(torch.int32)  # wraps: the highest bit is the sign


def write_bitnet(folder: Path, linear_class: str) -> None:
    """A tiny llama whose layers have three values, four of them in a byte, as BitNet is published."""
    write_model(TINY["llama"], folder, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        tensors[key] = tensor
        if tensor.dim() == 2 and ".layers." in key:
            values = torch.randint(
                0, 3, (4, tensor.shape[0] // 4, tensor.shape[1]), dtype=torch.uint8, generator=generator
            )
            tensors[key] = sum((values[place] << 2 * place for place in range(4)), torch.zeros_like(values[0]))
            tensors[f"{key}_scale"] = torch.full((1,), 0.2, dtype=torch.bfloat16)
    settings = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    _save(folder, tensors, settings | {"modules_to_not_convert": ["lm_head"]})


def _in_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` in FP8, and what each block of it has to be multiplied with."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // FP8_BLOCK[0], FP8_BLOCK[0], columns // FP8_BLOCK[1], FP8_BLOCK[1])
    scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    scaled = (blocks / scales[:, None, :, None]).view(rows, columns)
    return scaled.to(torch.float8_e4m3fn), scales


def _save(folder: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tiny_tokenizer().save_pretrained(folder)
