"""config.json before anybody believes it: an object of JSON, of a size for people, with counts that a model can have.

transformers builds as many layers as a config asks for, one by one. A count of a billion is refused here, where that
costs nothing; what no model can be built from is for whoever builds it to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from airstream.errors import CheckpointError, CheckpointNotFoundError

MAX_CONFIG_BYTES = 64 << 20
MAX_PARTS = 10_000
"""Layers, experts or heads. The largest models have a few hundred of each."""

PARTS = re.compile(r"(layer|block|expert|head|stage)s?$|(^|_)depths?$")
"""How the names of counts end for each of which something is built."""

AT_LEAST = dict.fromkeys(("hidden_size", "d_model", "n_embd", "vocab_size"), 1) | dict.fromkeys(
    ("intermediate_size", "d_ff", "head_dim", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head"), 0
)
"""What sizes are never below."""


def read_config_file(file: Path) -> dict[str, Any]:
    """What a config says. One that is none, or whose numbers are absurd, is refused.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: the message names the field.
    """
    if not file.is_file():
        raise CheckpointNotFoundError(f"{file.parent} has no config.json: it is not the folder of a transformers model")
    size = file.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file} has {size:,} bytes: it is not a config. Download it again")
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object. Download it again")
    for name, value in _numbers(config):
        if PARTS.search(name) and value > MAX_PARTS:
            raise CheckpointError(f"{file}: {name} is {value:,}; no model has more than {MAX_PARTS:,}")
        if value < AT_LEAST.get(name, value):
            raise CheckpointError(f"{file}: {name} is {value:,}; it cannot be less than {AT_LEAST[name]}")
    return config


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number with the name it has, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif type(value) is int:
        yield name, value
