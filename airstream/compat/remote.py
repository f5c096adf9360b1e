"""This knows checkpoints that bring their own modeling code, which runs only if the user says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from airstream.errors import UnsupportedError


def check_trust(config: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> None:
    """Refuse a checkpoint that is only known to its own code, unless that is trusted. Runs none of it.

    Args:
        config: what config.json says.
    """
    own = config.get("auto_map")
    if trust_remote_code or not isinstance(own, Mapping) or config.get("model_type") in CONFIG_MAPPING:
        return
    raise UnsupportedError(
        f"{folder} is of type {config.get('model_type')!r}, which this transformers version does not know, and brings "
        f"its own code: {', '.join(_files(own))}. Nothing of it has been run. Read it, and if you trust it, pass "
        "trust_remote_code=True"
    )


def with_generation(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`cls` with `generate`, which code of its own, written before transformers 4.50, expects to inherit."""
    return add_generation_mixin_to_remote_model(cls) if cls.__module__.startswith("transformers_modules.") else cls


def _files(auto_map: Mapping[str, Any]) -> list[str]:
    """The files, and the repositories if they are not in the folder, that hold the classes of `auto_map`."""
    references = [
        reference
        for value in auto_map.values()
        for reference in (value if isinstance(value, list) else [value])
        if isinstance(reference, str)
    ]
    return sorted({f"{reference.rpartition('.')[0].replace('--', '/')}.py" for reference in references})
