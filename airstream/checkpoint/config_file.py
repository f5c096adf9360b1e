"""This checks config.json before anybody believes it: an object of JSON, small, with numbers that a model can have.

transformers builds as many layers as a config asks for, one by one, and as many names of labels. A count of a billion
is refused here, where that costs nothing; what no model can be built from is for whoever builds it to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from airstream.checkpoint.names import CONFIG_FILE
from airstream.errors import CheckpointError, CheckpointNotFoundError
from airstream.system.foreign_json import CONFIG, read_json

_STAGES = "layer|block|stage|group|stack|level|repeat|flow|network|conv|loop|passe"
COUNT = re.compile(r"^(num|n)_(?!.*(param|token|position|ctx|embd|sample|step|word))")
"""How the names of counts begin."""

AT_MOST: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(rf"({_STAGES})s?(_num)?$|(^|_)depths?$"), 1_000),
    (re.compile(r"(expert|head|codebook|quantizer)s?$|(^|_)(labels|classes)$"), 100_000),
    (re.compile(r"_token_ids?$|_token_index$"), 100_000_000),
    (COUNT, 1_000_000),
)
"""How the names of numbers begin or end, and what they are never above: stages that data goes through, each of which is
built, the largest models having a few hundred; experts and heads, which one type has 16,384 of, and names of labels;
places in a vocabulary; all other counts but of what it was trained on."""

AT_LEAST = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "vocab_size"), 1)
    | dict.fromkeys(
        ("intermediate_size", "d_ff", "head_dim", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head"), 0
    )
    | {"num_images": -1}
)
"""What sizes are never below. No count is below 0."""

TYPES: Mapping[str, tuple[type, ...]] = dict.fromkeys(("sliding_window", "attention_chunk_size"), (int, list)) | (
    dict.fromkeys(("output_hidden_states", "output_attentions", "use_cache", "return_dict"), (bool, int))
    | dict.fromkeys(("model_type", "dtype", "torch_dtype"), (str,))
    | {"architectures": (list,), "id2label": (dict,), "is_encoder_decoder": (bool,)}
)
"""What a value is where transformers looks at it in the middle of a pass only, or says nothing of it; null may be
anywhere."""

CHOICES = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Fields that may name code of others on the hub, which transformers would fetch and run."""


def read_model_config(folder: Path) -> dict[str, Any]:
    """What the config in `folder` says. Errors as `read_config_file`; an adapter is told to be one."""
    file = folder / CONFIG_FILE
    if (folder / "adapter_config.json").is_file() and not file.is_file():
        raise CheckpointNotFoundError(
            f"{folder} is an adapter, not a model: load the model that it was trained with, and then "
            f"model.load_adapter({os.fspath(folder)!r})"
        )
    return read_config_file(file)


def read_config_file(file: Path) -> dict[str, Any]:
    """What a config says. One that is none, or whose numbers are absurd, is refused.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: the message names the field.
    """
    if not os.path.lexists(file):
        raise CheckpointNotFoundError(f"{file.parent} has no config.json: it is not the folder of a transformers model")
    config = read_object(file)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            check_types(file, part, TYPES)
    for name, choice in _choices(config):
        if "/" in choice:
            raise CheckpointError(
                f"{file}: {name} is {choice[:100]!r}, code of others on the hub: nothing of it is run. If you trust "
                f"it, remove {name} from the file and pass attn_implementation={choice[:100]!r}"
            )
    return config


def read_object(file: Path) -> dict[str, Any]:
    """The object of JSON in `file`, of which no number is absurd. Errors as `read_config_file`."""
    config = read_json(file, CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object. Download it again")
    check_numbers(file, config)
    return config


def check_numbers(file: Path, values: Mapping[str, Any]) -> None:
    """Refuse `values` that `file` says if one of them is a number that no model has.

    Raises:
        CheckpointError: the message names the field.
    """
    for name, value in _numbers(values):
        if value != value:
            raise CheckpointError(f"{file}: {name} is NaN, no number")
        for pattern, most in AT_MOST:
            if value > most and pattern.search(name):
                raise CheckpointError(f"{file}: {name} is {value:,}; no model has more than {most:,}")
        least = AT_LEAST.get(name, 0 if COUNT.search(name) else value)
        if value < least:
            raise CheckpointError(f"{file}: {name} is {value:,}; it cannot be less than {least}")


def check_types(file: Path, values: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse the first of `values` that is not of the types that its name has in `types`."""
    for name in filter(values.__contains__, types):
        value, expected = values[name], types[name]
        if value is not None and (not isinstance(value, expected) or (value is True and bool not in expected)):
            raise CheckpointError(
                f"{file}: {name} is {repr(value)[:100]}, of type {type(value).__name__}; "
                f"{' or '.join(kind.__name__ for kind in expected)} was expected"
            )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every whole number with the name it has, however deep, and what is no number where one should be."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif type(value) is int or value != value:
        yield name, value


def _choices(value: Any) -> Iterator[tuple[str, str]]:
    """Every choice of an implementation with the name it has; one for each part of a model may be in an object."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in CHOICES:
                named = inner.values() if isinstance(inner, dict) else (inner,)
                yield from ((key, choice) for choice in named if isinstance(choice, str))
            else:
                yield from _choices(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _choices(inner)
