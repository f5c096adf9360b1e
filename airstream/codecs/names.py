"""This names the codecs that a checkpoint can be written anew in, and says what each is. It refuses to know torch."""

from __future__ import annotations

from collections.abc import Mapping

from airstream.errors import ArgumentError
from airstream.reporting.alike import nearest

CODEC_NAMES: Mapping[str, str] = {
    "nf4": "bitsandbytes, 4.5 bits a weight",
    "int4": "compressed-tensors, 4.1 bits",
    "int8": "torchao, 8 bits",
    "fp8": "e4m3 in blocks, 8 bits",
}
"""By name, what writes and reads it, and how large it is."""


def check_codec(name: object) -> None:
    """Raise ArgumentError if no codec is called `name`."""
    if name in CODEC_NAMES:
        return
    meant = nearest(str(name), CODEC_NAMES)
    guess = f"did you mean {meant!r}? " if meant else ""
    raise ArgumentError(f"codec={name!r}: {guess}There is {', '.join(map(repr, CODEC_NAMES))}")
