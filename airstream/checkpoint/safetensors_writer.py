"""This writes safetensors files, padded so that the data begins on a page. It knows the format, and no order."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from airstream.reporting.units import round_up
from airstream.transfer.files import PAGE_BYTES

METADATA: Mapping[str, str] = {"format": "pt"}
"""What transformers looks for in a header."""


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] = METADATA, room: int = 0
) -> bytes:
    """What precedes the data of `tensors`, (name, type, shape, bytes) each, one behind the other: whole pages.

    Args:
        metadata: what the header says besides, of the file.
        room: the bytes to fill, if they are more.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    size = max(round_up(8 + len(text), PAGE_BYTES), room) - 8
    return struct.pack("<Q", size) + text.ljust(size)
