"""This names the codecs that a checkpoint can be written anew in, and says what each is. It refuses to know torch."""

from __future__ import annotations

from collections.abc import Mapping

from airstream.errors import ArgumentError
from airstream.reporting.alike import nearest

LOSSLESS_CODEC = "lossless"

CODEC_NAMES: Mapping[str, str] = {
    LOSSLESS_CODEC: "bfloat16 to three quarters, every bit comes back; for airstream alone",
    "nf4": "bitsandbytes, 4.5 bits a weight",
    "int4": "compressed-tensors, 4.1 bits",
    "int8": "torchao, 8 bits",
    "fp8": "e4m3 in blocks, 8 bits",
}
"""By name, what writes and reads it, and how large it is."""

OTHER_NAMES: Mapping[str, str] = {"4bit": "nf4", "8bit": "int8"}
"""What AirLLM calls them."""


def codec_named(name: object, argument: str = "codec") -> str:
    """The codec that is called `name`, here or elsewhere. `argument` is what it was given as.

    Raises:
        ArgumentError: none is.
    """
    if isinstance(name, str) and (known := OTHER_NAMES.get(name, name)) in CODEC_NAMES:
        return known
    names = (*CODEC_NAMES, *OTHER_NAMES)
    meant = nearest(str(name), names)
    guess = f"did you mean {meant!r}? There" if meant else "there"
    raise ArgumentError(f"{argument}={name!r} is not a codec: {guess} is {', '.join(map(repr, names))}")
