"""This says whether a quantised checkpoint is what somebody asks it to be quantised as.

It refuses to know how weights are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from airstream.compat.asked_formats import ARGUMENT, OF_THE_MACHINE, AskedFormat, read_asked
from airstream.compat.quantizer import DEQUANTIZED, DEQUANTIZED_ON_CPU
from airstream.errors import ArgumentError

__all__ = ["check_same"]


def check_same(asked: AskedFormat, stored: Mapping[str, Any], file: Path, device: torch.device) -> None:
    """Refuse what is `asked` of a checkpoint that is quantised already, unless it is that.

    Args:
        stored: what `file`, its config.json, says of it.
        device: the one that computes.

    Raises:
        ArgumentError: the message names both.
    """
    method = str(stored.get("quant_method") or "bitsandbytes")
    if asked.method != method:
        raise ArgumentError(
            f"{asked} asks for {asked.method!r}, and the checkpoint is quantised with {method!r} already ({file}): "
            f"leave {ARGUMENT} out, or name the checkpoint that it was made of"
        )
    said = _completed(stored)
    for field, value in asked.settings.items():
        if field not in said or field.startswith("_") or field in OF_THE_MACHINE or value in (None, said[field]):
            continue
        is_made_dense = method in DEQUANTIZED or (method in DEQUANTIZED_ON_CPU and device.type == "cpu")
        if field == "dequantize" and is_made_dense:
            continue
        raise ArgumentError(
            f"{asked} has {field}={value!r}, and the checkpoint is quantised already with {said[field]!r} ({file}): "
            f"leave {ARGUMENT} out, or name the checkpoint that it was made of"
        )


def _completed(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """`stored`, with the values of what it does not say, if transformers knows them."""
    try:
        return read_asked({name: stored[name] for name in stored}).settings
    except ArgumentError:
        return stored
