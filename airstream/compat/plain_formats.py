"""This says of which quantised checkpoints kernels make weights dense, by what their config says.

It refuses to know how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airstream.codecs.library import has_kernels

__all__ = ["LIBRARY_ITEM_BYTES", "groups_of", "is_plain_int4", "kernel_for"]

LIBRARY_ITEM_BYTES = 12
"""What compressed-tensors takes at least for each number, which the meta device does not show."""


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
    groups = [group.get("weights") or {} for group in groups_of(settings)]
    return bool(groups) and settings.get("format") == "pack-quantized" and all(
        not group.get("actorder") and wanted.items() <= group.items() for group in groups
    )  # fmt: skip


def kernel_for(method: str, settings: Mapping[str, Any]) -> str | None:
    """What the kernel is called that makes weights dense which `method` quantised, of whose config `settings` are.

    None if there is none.
    """
    if method == "compressed-tensors" and is_plain_int4(settings) and has_kernels():
        return "int4"
    return "fp8" if method == "fp8" and has_kernels() else None
