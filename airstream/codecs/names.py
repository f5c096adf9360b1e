"""These are the codecs that a checkpoint can be repacked with, by the names that users type."""

from __future__ import annotations

from collections.abc import Mapping

from airstream.errors import ArgumentError

LOSSLESS_CODEC = "lossless"

CODECS = (LOSSLESS_CODEC,)

OTHER_NAMES: Mapping[str, str] = {}
"""What other libraries call them."""


def codec_named(name: object) -> str:
    """The codec that `name` means.

    Raises:
        ArgumentError: none does.
    """
    if isinstance(name, str) and (codec := OTHER_NAMES.get(name, name)) in CODECS:
        return codec
    raise ArgumentError(f"codec={name!r} is not known: {', '.join(map(repr, (*CODECS, *OTHER_NAMES)))} is, or none")
