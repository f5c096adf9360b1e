"""This says of which quantised checkpoints kernels make weights dense, by what their config says.

It refuses to know how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airstream.codecs.library import has_kernels

__all__ = ["LIBRARY_ITEM_BYTES", "has_kernels_for", "is_plain_int4"]

LIBRARY_ITEM_BYTES = 12
"""What compressed-tensors takes at least for each number, which the meta device does not show."""


def is_plain_int4(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of compressed-tensors has symmetric integers of 4 bits in groups, one behind the other."""
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    groups = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]
    return bool(groups) and settings.get("format") == "pack-quantized" and all(
        not group.get("actorder") and wanted.items() <= group.items() for group in groups
    )  # fmt: skip


def has_kernels_for(method: str, settings: Mapping[str, Any]) -> bool:
    """Whether there are kernels for weights quantised by `method`, of whose config `settings` are."""
    return has_kernels() and (method == "fp8" or (method == "compressed-tensors" and is_plain_int4(settings)))
