"""These are the names of a config and of the files of weights, as transformers looks for them.

What is in them is for other modules.
"""

from __future__ import annotations

from pathlib import PurePosixPath

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

MANIFEST = "airstream-repack.json"
"""What a repacked checkpoint says of itself."""

MAX_NAME = 255
"""Characters of a name: systems take no longer ones."""


def file_name(name: str, variant: str | None) -> str:
    """What transformers calls the file `name` of a variant of a checkpoint: `model.fp16.safetensors`."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def is_inside(path: str) -> bool:
    """Whether `path` lies inside the folder that it is relative to, stands for itself, and is short enough."""
    inside = PurePosixPath(path)
    is_short = all(len(part) <= MAX_NAME for part in inside.parts)
    return is_short and not inside.is_absolute() and ".." not in inside.parts and not set("\\*?[\0") & set(path)
