"""These are the options of `from_pretrained`, checked before anything is opened.

This knows names and values. It refuses to know checkpoints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from airstream.checkpoint.hub import HubOptions
from airstream.checkpoint.names import is_inside
from airstream.codecs.names import codec_named
from airstream.compat.asked_formats import AskedFormat
from airstream.errors import ArgumentError
from airstream.reporting.paths import path_of
from airstream.reporting.units import parse_budget
from airstream.system.memory import default_device, describe_devices, is_present
from airstream.transfer.runtime import RUNTIMES

MaxMemory = int | float | str | Mapping[int | str, int | float | str] | None

SHORT_DTYPES: Mapping[str, str] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""What people call them."""

SOURCE_OPTIONS = (
    "gguf_file", "subfolder", "variant", "revision", "token", "cache_dir", "local_files_only", "trust_remote_code",
)  # fmt: skip
"""Options that say where a checkpoint comes from."""

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Types that models compute in. Others of torch, such as float8, are for what is stored."""

FOREIGN_DEVICES: Mapping[str, str] = {
    **dict.fromkeys(("gpu", "nvidia", "amd", "rocm"), "cuda"),
    **dict.fromkeys(("metal", "apple"), "mps"),
    "intel": "xpu",
}
"""What people call the devices that torch has under another name."""


EXACT, FAST = "exact", "fast"
"""Products as transformers makes them, or by kernels that round otherwise."""

VARIANT = re.compile(r"[\w-]{1,100}")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The arguments of `AutoModel.from_pretrained`; see there. The defaults are also those of the command line."""

    dtype: str | torch.dtype = "auto"
    device: str | int | torch.device | None = None
    max_memory: MaxMemory = None
    max_context: int | None = None
    max_batch_size: int = 1
    layers_per_batch: int | Literal["auto"] = "auto"
    prefetch_batches: int | Literal["auto"] = "auto"
    page_cache: bool | Literal["auto"] = "auto"
    model_class: Any = None
    attn_implementation: str | None = None
    compression: str | AskedFormat | None = None
    kernels: Literal["exact", "fast"] = "exact"
    gguf_file: str | None = None
    subfolder: str = ""
    variant: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    profiling_mode: bool = False
    progress: bool | Literal["auto"] = "auto"

    @property
    def hub(self) -> HubOptions:
        """The options that say where the checkpoint is looked for."""
        return HubOptions(
            self.revision, self.token, self.cache_dir, self.local_files_only, self.subfolder, self.variant
        )

    def __post_init__(self) -> None:
        check_count("max_batch_size", self.max_batch_size, at_least=1)
        if self.max_context is not None:
            check_count("max_context", self.max_context, at_least=1)
        if self.layers_per_batch != "auto":
            check_count("layers_per_batch", self.layers_per_batch, at_least=1)
        if self.prefetch_batches != "auto":
            check_count("prefetch_batches", self.prefetch_batches, at_least=0)
        for name in ("page_cache", "progress"):
            check_flag(name, getattr(self, name), word="auto")
        for name in ("trust_remote_code", "local_files_only", "profiling_mode"):
            if getattr(self, name) is not None:
                check_flag(name, getattr(self, name))
        for name in ("gguf_file", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ArgumentError(f"{name}={getattr(self, name)!r} is not text")
        if not isinstance(self.token, str | bool | None):
            raise ArgumentError(f"token={self.token!r} is neither text nor True or False")
        if self.cache_dir is not None:
            path_of("cache_dir", self.cache_dir)
        named = named_dtype(self.dtype)
        if self.dtype != "auto" and named not in COMPUTE_DTYPES:
            raise ArgumentError(
                f'dtype={self.dtype!r} is not a type that models compute in: use "auto", "bfloat16", torch.float16... '
                'To pack weights, name a codec: compression="4bit"'
            )
        if self.compression is not None and not isinstance(self.compression, AskedFormat):
            codec_named(self.compression, "compression")
        if self.kernels not in (EXACT, FAST):
            raise ArgumentError(
                f'kernels={self.kernels!r} is neither "exact", as transformers computes, nor "fast", with weights as '
                "they are stored, which rounds otherwise"
            )
        check_inside("subfolder", self.subfolder)
        if self.variant is not None and not (isinstance(self.variant, str) and VARIANT.fullmatch(self.variant)):
            raise ArgumentError(f'variant={self.variant!r} is not a part of a file\'s name: use one such as "fp16"')


def named_dtype(dtype: str | torch.dtype) -> Any:
    """What torch has under the name `dtype`, long or short; nothing for `"auto"`."""
    if not isinstance(dtype, str):
        return dtype
    name = dtype.removeprefix("torch.")
    return getattr(torch, SHORT_DTYPES.get(name, name), None)


def resolve_device(device: str | int | torch.device | None) -> torch.device:
    """The device named by the user, with its index; the accelerator, or else the CPU, if none is named."""
    if device is None or device == "auto":
        return default_device()
    name = device.lower() if isinstance(device, str) else device
    try:
        chosen = torch.device(name)
    except (RuntimeError, TypeError) as error:
        kind, *number = name.split(":") if isinstance(name, str) else [""]
        if kind in FOREIGN_DEVICES:
            meant = ":".join([FOREIGN_DEVICES[kind], *number])
            raise ArgumentError(f'device={device!r} is called "{meant}" in torch: write device="{meant}"') from None
        raise ArgumentError(f"device={device!r} is not a device of this torch: {error}") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type == "meta":
        raise ArgumentError('device="meta" has no memory to stream to')
    found = torch.device(chosen.type, chosen.index or 0)
    if chosen.type not in RUNTIMES and not is_present(found):
        raise ArgumentError(f"device={device!r} is not there: torch finds {describe_devices()}")
    return found


def parse_max_memory(max_memory: MaxMemory, device: torch.device) -> dict[str, int]:
    """The budgets given, in bytes: "cpu" for host memory, "0" for accelerator 0. A tier that is not named is left out.

    One size alone is the budget of the device that computes.
    """
    compute = "cpu" if device.type == "cpu" else str(device.index)
    if max_memory is None or max_memory == "auto":
        return {}
    if not isinstance(max_memory, Mapping):
        return {compute: parse_budget(max_memory, "max_memory")}
    if not max_memory:
        raise ArgumentError(
            f"max_memory={max_memory!r} names no memory: write max_memory={_example(compute)}, or leave it out to use "
            "most of what is free"
        )
    budgets: dict[str, int] = {}
    for key, size in max_memory.items():
        name = compute if str(key) == str(device) else str(key)
        if name not in ("cpu", compute):
            if compute == "cpu" and name.removeprefix("cuda:").isdigit():
                raise ArgumentError(
                    f"max_memory names {key!r}, but the model runs on cpu: a number is an accelerator's memory. Write "
                    f'max_memory={{"cpu": {size!r}}} for that of this machine, or choose a device="cuda" that is here'
                )
            raise ArgumentError(
                f"max_memory names {key!r}, but the model runs on {device}: write "
                f"max_memory={_example(compute)}, or choose another device="
            )
        if size != "auto":
            budgets[name] = parse_budget(size, f"max_memory[{key!r}]")
    return budgets


def _example(compute: str) -> str:
    """Budgets of a model that computes in the memory `compute`."""
    return '{"cpu": "4GiB"}' if compute == "cpu" else f'{{{compute}: "4GiB", "cpu": "8GiB"}}'


def check_count(name: str, value: object, at_least: int) -> None:
    """Raise unless `value` is a whole number of `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ArgumentError(f"{name}={value!r} must be a whole number of at least {at_least}")


def check_flag(name: str, value: object, word: str | None = None) -> None:
    """Raise unless `value` is True or False, which any text would be, or the `word` that may stand in their place."""
    if not (isinstance(value, int) and value in (0, 1)) and not (isinstance(value, str) and value == word):
        wanted = "True or False" if word is None else f'True, False or "{word}"'
        raise ArgumentError(f"{name}={value!r}: use {wanted}")


def check_inside(name: str, path: object) -> None:
    """Raise unless `path`, an argument called `name`, lies inside whatever it is relative to, and stands for itself."""
    if not isinstance(path, str) or not is_inside(path):
        raise ArgumentError(f"{name}={path!r} is not a path inside the repository")
