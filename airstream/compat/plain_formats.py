"""This says of which quantised checkpoints kernels make weights dense, by what their config says.

It refuses to know how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airstream.codecs.library import has_kernels

__all__ = ["LIBRARY_ITEM_BYTES", "groups_of", "is_plain_int4", "kernel_for", "says_packing"]

LIBRARY_ITEM_BYTES = 12
"""What compressed-tensors takes at least for each number, which the meta device does not show."""

SUMMARIES = (None, "dense", "mixed-precision")
"""What a config of compressed-tensors calls the format where groups have formats of their own, or imply them."""


def says_packing(name: str | None) -> bool:
    """Whether `name`, a format of compressed-tensors, says how numbers lie in words."""
    return name not in SUMMARIES


def groups_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups of weights that a config of compressed-tensors describes, those named by a preset spelled out."""
    groups = settings.get("config_groups") or {}
    return [_spelled_out(name, group) for name, group in groups.items()]


def _spelled_out(name: str, group: Any) -> Mapping[str, Any]:
    if isinstance(group, Mapping):
        return group
    try:
        from compressed_tensors.quantization import preset_name_to_scheme

        described: Mapping[str, Any] = preset_name_to_scheme(name, list(group)).model_dump(mode="json")
    except (ImportError, KeyError, TypeError, ValueError):
        return {}  # transformers says what is missing, or unknown
    return described


def is_plain_int4(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of compressed-tensors has symmetric integers of 4 bits in groups, one behind the other."""
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    groups = groups_of(settings)
    return bool(groups) and all(_is_in_words(settings, group) for group in groups) and all(
        not each.get("actorder") and wanted.items() <= each.items() for each in (group["weights"] for group in groups)
    )  # fmt: skip


def _is_in_words(settings: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether the integers of `group` lie in 32-bit words, as these do of which nothing else is said."""
    named = group.get("format") or settings.get("format")
    is_packed = settings.get("quantization_status") == "compressed"
    return bool(group.get("weights")) and (named == "pack-quantized" or (is_packed and not says_packing(named)))


def kernel_for(method: str, settings: Mapping[str, Any]) -> str | None:
    """What the kernel is called that makes weights dense which `method` quantised, of whose config `settings` are.

    None if there is none.
    """
    if method == "compressed-tensors" and is_plain_int4(settings) and has_kernels():
        return "int4"
    return "fp8" if method == "fp8" and has_kernels() else None
