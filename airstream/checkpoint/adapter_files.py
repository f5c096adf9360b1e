"""This checks the files of a PEFT adapter before PEFT believes them: sane numbers, patterns and choices, sound weights.

PEFT makes what a config asks for, copies layers as often as it says, matches its patterns against every module's name
and imports a module that it names. It knows which files an adapter has; refuses to know what kinds of adapters there
are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from airstream.checkpoint.config_file import read_object
from airstream.checkpoint.pickles.tensors import read_pickle
from airstream.checkpoint.safetensors import read_header
from airstream.errors import CheckpointError, CheckpointNotFoundError, UnsupportedError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

AT_MOST = (
    (re.compile(r"(^|_)(r|rank|rank_pattern)$"), 65_536),
    (re.compile(r"(seed|key|steps?|tokens?|token_indices|init|final|version)$"), 1 << 64),
    (re.compile(""), 1_000_000),
)
"""What whole numbers in a field are never above, by its name: the first that fits counts. Ranks are below the width of
the widest models; seeds, steps of training and places in a vocabulary ask for nothing."""

PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
"""Fields with regular expressions, or with names that may be."""

MAX_PATTERN = 2_000
MAX_REPEATS = 6
_ESCAPED = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEATED_GROUP = re.compile(r"\)\s*(?:[*+]|\{)")
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}")

REFUSED = {
    "layer_replication": "layers that are there several times",
    "megatron_config": "modules of Megatron, by importing what megatron_core names",
}
"""Fields that must be empty, and what else they ask for."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What the config of the adapter in `folder` says.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointError: it is not sound. The message names the field.
        UnsupportedError: it asks for what no streamed model can do.
    """
    file = folder / CONFIG
    if not file.exists():
        raise CheckpointNotFoundError(f"there is no PEFT adapter in {str(folder)!r}: it has no {CONFIG}")
    config = read_object(file)
    if not isinstance(config.get("peft_type"), str):
        raise CheckpointError(
            f"{file}: peft_type is {str(config.get('peft_type'))[:100]!r}: it must name a kind of PEFT"
        )
    for name, value in config.items():
        most = next(most for pattern, most in AT_MOST if pattern.search(name))
        for number in _leaves(value, int):
            if abs(number) > most:
                raise CheckpointError(f"{file}: {name} is {number:,}; no adapter has more than {most:,}")
        if name in PATTERNS:
            _check_patterns(file, name, value)
    for name, what in REFUSED.items():
        if config.get(name):
            raise UnsupportedError(
                f"{file}: {name} asks for {what}: a streamed model has none. Merge the adapter first"
            )
    return config


def check_adapter_weights(folder: Path) -> int:
    """Check that the weights of the adapter in `folder` are what their file's header says; nothing in it is executed.

    Returns:
        Bytes of them.

    Raises:
        CheckpointNotFoundError, CheckpointError: there are none, or they are not sound.
    """
    if (file := folder / WEIGHTS).exists():
        return sum(tensor.end - tensor.offset for tensor in read_header(file))
    if (file := folder / PICKLED_WEIGHTS).exists():
        in_place, scattered = read_pickle(file)
        return sum(tensor.end - tensor.offset for tensor in in_place) + sum(tensor.nbytes for tensor in scattered)
    raise CheckpointNotFoundError(f"{folder} has no {WEIGHTS}: it is not the folder of a whole PEFT adapter")


def _check_patterns(file: Path, name: str, value: Any) -> None:
    """Refuse regular expressions that are none, or that may take for ever to find that a name does not fit."""
    for pattern in _leaves(value, str):
        bare = _ESCAPED.sub("_", pattern)
        repeats = len(_REPEAT.findall(bare))
        if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or _REPEATED_GROUP.search(bare):
            raise CheckpointError(
                f"{file}: {name} has the pattern {pattern[:100]!r}, which may take for ever to match: it repeats a "
                f"group, or more than {MAX_REPEATS} things, or is longer than {MAX_PATTERN:,} letters. List the names"
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{file}: {name} has {pattern[:100]!r}, which is no pattern: {error}") from None


def _leaves(value: Any, kind: type) -> Iterator[Any]:
    """Every value of type `kind` in lists and objects, with the keys of these."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(key, kind)
            yield from _leaves(inner, kind)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, kind)
    elif type(value) is kind:
        yield value
