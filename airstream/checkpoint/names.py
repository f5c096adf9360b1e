"""These are the names of the files of weights, as transformers looks for them. What is in them is for other modules."""

from __future__ import annotations

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def file_name(name: str, variant: str | None) -> str:
    """What transformers calls the file `name` of a variant of a checkpoint: `model.fp16.safetensors`."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"
