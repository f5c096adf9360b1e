"""A Llama whose widths are multiples of 128, by zeros: the formats with blocks of 128 take all of its weights then.

It computes what the narrow one does, up to the rounding of norms: their weights make up for the zeros in the mean.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import INDEX_NAME

BLOCK = 128
SMALL_FILES = "*.j*"
"""Config, tokenizer, chat template."""

Config = dict[str, Any]


def is_wide(folder: Path) -> bool:
    """Whether every width of the checkpoint in `folder` is a multiple of 128 already."""
    config = _config(folder)
    heads = [config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value")]
    return all(width % BLOCK == 0 for width in (config["hidden_size"], config["intermediate_size"], *heads))


def widened(config: Config) -> Config:
    """`config`, with the next widths that are multiples of 128, and as many queries for each key as before."""
    grouped = config["num_attention_heads"] // config["num_key_value_heads"]
    pairs = config["num_key_value_heads"]
    while pairs * config["head_dim"] % BLOCK:
        pairs += 1
    hidden = config["hidden_size"]
    while hidden % BLOCK or hidden % (grouped * pairs):
        hidden += 1
    return config | {
        "hidden_size": hidden,
        "intermediate_size": _up(config["intermediate_size"]),
        "num_attention_heads": grouped * pairs,
        "num_key_value_heads": pairs,
        "rms_norm_eps": config["rms_norm_eps"] * config["hidden_size"] / hidden,
    }


def widen(folder: Path, out: Path) -> None:
    """Write the Llama in `folder` to the new folder `out`, wider. Holds its weights twice in memory.

    Raises:
        ValueError: it is no plain Llama without biases.
    """
    config, made = _config(folder), widened(_config(folder))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in folder.glob(SMALL_FILES):
        if file.name != INDEX_NAME:
            shutil.copy(file, partial)
    (partial / "config.json").write_text(json.dumps(made, indent=2))
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: _padded(name, tensor, config, made) for name, tensor in load_file(file).items()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(out)


def _config(folder: Path) -> Config:
    config: Config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{folder} is no Llama without biases: only that is widened")
    return config | {"head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]}


def _up(width: int) -> int:
    return -(-width // BLOCK) * BLOCK


def _padded(name: str, tensor: torch.Tensor, config: Config, made: Config) -> torch.Tensor:
    """The weight with zeros behind its rows and columns; a norm's, smaller by what zeros take from a mean square."""
    if tensor.dim() == 1:
        tensor = (tensor.float() * math.sqrt(config["hidden_size"] / made["hidden_size"])).to(tensor.dtype)
        return torch.nn.functional.pad(tensor, (0, made["hidden_size"] - len(tensor)))
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return torch.nn.functional.pad(tensor, (0, made["hidden_size"] - tensor.shape[1]))
    widths = {
        "q_proj": (made["num_attention_heads"] * made["head_dim"], made["hidden_size"]),
        "k_proj": (made["num_key_value_heads"] * made["head_dim"], made["hidden_size"]),
        "o_proj": (made["hidden_size"], made["num_attention_heads"] * made["head_dim"]),
        "gate_proj": (made["intermediate_size"], made["hidden_size"]),
        "down_proj": (made["hidden_size"], made["intermediate_size"]),
    }
    widths |= {"v_proj": widths["k_proj"], "up_proj": widths["gate_proj"]}
    rows, columns = widths[name.split(".")[-2]]
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))
