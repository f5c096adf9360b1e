"""This settles what `quantization_config=` means for one checkpoint: nothing, if it is that already, or how to pack it.

It reads a config, so that nothing is downloaded or packed before a refusal. It refuses to know how one packs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from airstream.checkpoint.config_file import read_config_file
from airstream.codecs.names import codec_named
from airstream.compat.asked_codecs import codec_for
from airstream.compat.asked_formats import ARGUMENT, AskedFormat
from airstream.compat.same_format import check_same
from airstream.errors import AirstreamError, UnsupportedError
from airstream.loading.options import LoadOptions, named_dtype

__all__ = ["codec_name", "reworded", "settled"]


def settled(options: LoadOptions, folder: Path, gguf: Path | None, device: torch.device) -> LoadOptions:
    """`options`, with what is asked for as it is to be packed; without it, if the checkpoint is that already.

    Args:
        folder: where the config is; the weights need not be there.
        gguf: the GGUF file that is named instead.
        device: the one that computes.

    Raises:
        ArgumentError: the checkpoint is quantised already, otherwise.
        UnsupportedError: what is asked for cannot be had.
    """
    asked = options.compression
    if not isinstance(asked, AskedFormat):
        return options
    if gguf is not None:
        raise UnsupportedError(f"{gguf} is packed already, as GGUF: leave {ARGUMENT} out")
    file = folder / "config.json"
    stored = _stored(read_config_file(file))
    if stored is not None:
        check_same(asked, stored, file, device)
        return replace(options, compression=None)
    codec_for(asked)
    dtype = None if options.dtype == "auto" else named_dtype(options.dtype)
    return replace(options, compression=replace(asked, dtype=dtype))


def _stored(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config says of how the model, or a part of it, is quantised."""
    for owner in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        found = owner.get(ARGUMENT)
        if isinstance(found, Mapping) and found:
            return found
    return None


def codec_name(compression: str | AskedFormat) -> str:
    """The codec that is meant."""
    return codec_named(compression, "compression") if isinstance(compression, str) else codec_for(compression).name


@contextmanager
def reworded(compression: str | AskedFormat) -> Iterator[None]:
    """Where something is packed: errors call `codec` what whoever asked for it has called otherwise."""
    try:
        yield
    except AirstreamError as error:
        said = f"compression={compression!r}" if isinstance(compression, str) else str(compression)
        raise type(error)(str(error).replace(f"codec={codec_name(compression)!r}", said)) from error
