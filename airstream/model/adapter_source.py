"""This loads an adapter from a folder or a hub id, whose files are measured before PEFT believes them.

PEFT's own dataclasses say of which type each field of a config is; PEFT itself looks only when it stumbles. It refuses
to know what an adapter does to a model.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from airstream.checkpoint.adapter_files import (
    CONFIG,
    PICKLED_WEIGHTS,
    WEIGHTS,
    check_adapter_weights,
    read_adapter_config,
)
from airstream.checkpoint.hub import HubOptions, resolve
from airstream.compat.blame import blamed_on
from airstream.errors import ArgumentError, BudgetError, CheckpointError, CheckpointNotFoundError
from airstream.reporting.units import format_bytes
from airstream.system.memory import available_host_bytes

_DOWNLOAD = {field.name for field in dataclasses.fields(HubOptions)} - {"variant"}
"""What users may say of a hub id."""

PATTERNS = tuple((name, dict[str, float] | None) for name in ("rank_pattern", "alpha_pattern"))
"""Fields of which PEFT says less than it means."""


class Source:
    """The adapter called `name`. Nothing is read or downloaded before it is asked for."""

    def __init__(self, name: str | os.PathLike[str] | None, download: Mapping[str, Any]) -> None:
        self._name = name
        self._hub = HubOptions(
            **{key: value for key, value in download.items() if key in _DOWNLOAD and value is not None}
        )

    def config(self) -> Any:
        """PEFT's config of it. Errors as `read_adapter_config`."""
        from peft import PeftConfig

        folder = self._folder([CONFIG])
        _check_types(folder / CONFIG, read_adapter_config(folder))
        with blamed_on(f"{folder / CONFIG} is not a config of PEFT's"):
            return PeftConfig.from_pretrained(str(folder))

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Its tensors, in host memory. Errors as `check_adapter_weights`."""
        from peft import load_peft_weights

        folder = self._folder([WEIGHTS])
        if not (folder / WEIGHTS).exists():
            folder = self._folder([PICKLED_WEIGHTS])
        nbytes, free = check_adapter_weights(folder), available_host_bytes()
        if nbytes > free:
            raise BudgetError(
                f"the adapter in {folder} takes {format_bytes(nbytes)}, and {format_bytes(free)} of memory are free"
            )
        with blamed_on(f"the weights of the adapter in {folder} cannot be loaded"):
            return load_peft_weights(str(folder), device="cpu")

    def blame(self) -> str:
        """What an error begins with that comes of the config."""
        return "its config" if self._name is None else f"{CONFIG} in {os.fspath(self._name)!r}"

    def _folder(self, files: list[str]) -> Path:
        if self._name is None:
            raise ArgumentError("load_adapter() needs a folder or hub id, or both peft_config= and adapter_state_dict=")
        try:
            return resolve(self._name, self._hub, weight_files=files)
        except CheckpointNotFoundError as error:
            raise CheckpointNotFoundError(f"there is no PEFT adapter in {os.fspath(self._name)!r}: {error}") from error


def _check_types(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config with a value that is not of the type that its field has in PEFT."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KINDS

    kind = config["peft_type"]
    if kind not in KINDS:
        known = ", ".join(sorted(str(getattr(each, "value", each)) for each in KINDS))
        raise CheckpointError(f"{file}: peft_type is {kind[:100]!r}, which this PEFT does not know: it has {known}")
    for name, hint in (*_hints(KINDS[kind]), *PATTERNS):
        if name in config and not _fits(config[name], hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise CheckpointError(f"{file}: {name} is {str(config[name])[:100]!r}; {expected[:200]} was expected")


def _hints(kind: Any) -> Iterator[tuple[str, Any]]:
    try:
        yield from typing.get_type_hints(kind).items()
    except (NameError, TypeError):  # of types that PEFT imports for type checkers alone
        return


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value`, of JSON, can be meant by `hint`. Whole numbers and others are not told apart."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None or hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return any(_fits(value, type(each)) for each in arguments)
    kind = origin or hint
    if kind in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (list, tuple, set):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list) and all(_fits(each, inner) for each in value)
    if kind is dict:
        inner = arguments[1] if arguments else Any
        return isinstance(value, dict) and all(_fits(each, inner) for each in value.values())
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return isinstance(value, str)
    return isinstance(value, kind) if isinstance(kind, type) else True
