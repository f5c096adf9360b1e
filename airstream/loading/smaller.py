"""This says which codecs a model that is streamed could be packed with, and what it would be then.

It names those whose time is predicted whole: where the CPU computes, what it takes to expand quantised weights is not
counted, so that they are not named there. It refuses to know what a plan makes of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from airstream.errors import UnsupportedError
from airstream.loading.machine import Machine
from airstream.loading.prepare import prepare_for_planning
from airstream.loading.prepared import Prepared
from airstream.plan.facts import ModelFacts
from airstream.plan.request import Request

SAME_BITS, ROUNDED = "equal to the bit", "rounds the weights"

ADVICE: Mapping[str, str] = {"lossless": SAME_BITS, "8bit": ROUNDED, "4bit": ROUNDED}
"""Codecs by what users call them, in the order in which they are named, and what becomes of results."""


def packed_alternatives(
    name: str | os.PathLike[str],
    options: Mapping[str, Any],
    machine: Machine,
    prompt_tokens: int | None,
    plain: Prepared,
) -> dict[str, tuple[ModelFacts, Request]]:
    """What is known of the model `plain`, packed, by what to ask for that. Arguments as `prepare_for_planning`."""
    if plain.options.compression is not None or plain.quantizer is not None:
        return {}
    found: dict[str, tuple[ModelFacts, Request]] = {}
    for codec, what in ADVICE.items():
        if plain.device.type == "cpu" and what != SAME_BITS:
            continue
        try:
            packed = prepare_for_planning(name, {**options, "compression": codec}, machine, prompt_tokens)
        except UnsupportedError:
            continue
        if packed.facts != plain.facts:  # else there is nothing to pack
            found[f'compression="{codec}" ({what})'] = packed.facts, packed.request
    return found
