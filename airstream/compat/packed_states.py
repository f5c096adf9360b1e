"""This reads what bitsandbytes says beside each of its weights in 4 bits: JSON, stored as a tensor of bytes.

It knows where the text lies, and refuses to know what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airstream.checkpoint.stored import StoredTensor
from airstream.system.foreign_json import CONFIG, parse_json

__all__ = ["read_state"]

MAX_BYTES = 1 << 16
"""Of one text. They have less than 300."""


def read_state(state: StoredTensor) -> Mapping[str, Any] | None:
    """What `state` says; None if its file is not there, as where a plan is made from headers alone.

    Raises:
        ValueError: it is no object of JSON.
    """
    if state.dtype != "U8" or state.nbytes > MAX_BYTES:
        raise ValueError(f"that has U8, and at most {MAX_BYTES:,} bytes")
    try:
        with state.file.open("rb") as file:
            file.seek(state.offset)
            raw = file.read(state.nbytes)
    except OSError:
        return None
    said = parse_json(raw, CONFIG)
    if not isinstance(said, Mapping):
        raise ValueError("it is no object of JSON")
    return said
