"""This makes the model's tensors of the raw ones that have been read, where transformers has to see values for that.

Dense tensors are made in place, in their slab, each time its bytes have come. Weights that are objects are made of
views, once for each place in memory, and last as long as their layer's bytes come to the same place.

It knows which tensors of a slab have to be made of which. It refuses to know how: that is behind `KeyConversion`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch

from airstream.compat.assembled import Assembled
from airstream.compat.blame import told
from airstream.compat.key_conversion import KeyConversion
from airstream.errors import AirstreamError, CheckpointError
from airstream.layout.slab import Slab
from airstream.layout.tensors import RAW_PREFIX, Conversion, TensorSpec, view_of
from airstream.reporting.probe import CONVERT, Moment, Probe
from airstream.transfer.shortage import shortage_in
from airstream.transfer.unpacking import unpack

Source = tuple[str, str, torch.Tensor]
"""A raw tensor as converters of transformers take it: checkpoint key, pattern, values."""


Kept = Mapping[str, torch.Tensor]
"""By name, raw tensors that are in none of the memory that a slab fills: they stay packed elsewhere."""

NOTHING: Kept = MappingProxyType({})


class Run(Protocol):
    """Runs the conversions that a slab asks for."""

    def __call__(self, slab: Slab, memory: torch.Tensor, kept: Kept = NOTHING) -> None:
        """Make of the raw tensors in `memory`, once they are there, and of those in `kept` what is to be made."""


@dataclass(frozen=True, slots=True)
class Converter:
    """The conversions of one model.

    Attributes:
        run: runs those that a slab asks for, on its bytes, once they are there.
        build: makes the object of one of them from views of a memory, by the offsets at which its sources start.
    """

    run: Run
    build: Callable[[Conversion, torch.Tensor, Mapping[str, int]], Assembled]


def converter_of(keys: KeyConversion, probe: Probe, moment: Callable[[], Moment]) -> Converter:
    """The conversions that `keys` runs. `probe` is told of them; `moment` is the device's, as `Backend.moment`."""
    return Converter(partial(convert_slab, keys, probe, moment), partial(_build, keys))


def convert_slab(
    keys: KeyConversion,
    probe: Probe,
    moment: Callable[[], Moment],
    slab: Slab,
    memory: torch.Tensor,
    kept: Kept = NOTHING,
) -> None:
    """Unpack what has landed packed in a freshly filled slab, and run its conversions: raw tensors in, the model's
    tensors in `memory` out.
    """
    unpack(slab.unpackings, memory, kept, probe, moment)
    specs = {spec.name: spec for spec in slab.specs}
    for conversion in slab.conversions:
        if conversion.is_object:
            continue
        with probe.span(CONVERT, conversion.nbytes, moment):
            only = specs.get(conversion.name)
            into = view_of(memory, slab.offsets[only.name], only) if only is not None else None
            made = _made(keys, conversion, _sources(conversion, memory, slab.offsets, kept), into)
            for name, value in made.items():
                if into is None or not value.is_set_to(into):
                    view_of(memory, slab.offsets[name], specs[name]).copy_(value)


def _made(
    keys: KeyConversion, conversion: Conversion, sources: list[Source], into: torch.Tensor | None
) -> Mapping[str, torch.Tensor]:
    try:
        return keys.convert(conversion.name, sources, into)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, AirstreamError) or shortage_in(error) is not None:
            raise
        raise CheckpointError(
            f"the packed tensors of {conversion.name!r} cannot be converted as config.json says: {told(error)}. Either "
            "of them is damaged: download the checkpoint again"
        ) from error


def _build(keys: KeyConversion, conversion: Conversion, memory: torch.Tensor, offsets: Mapping[str, int]) -> Assembled:
    return keys.assemble(conversion.name, _sources(conversion, memory, offsets))


def _sources(
    conversion: Conversion, memory: torch.Tensor, offsets: Mapping[str, int], kept: Kept = NOTHING
) -> list[Source]:
    def values(raw: TensorSpec) -> torch.Tensor:
        return kept[raw.name] if raw.name in kept else view_of(memory, offsets[raw.name], raw)

    return [
        (raw.name.removeprefix(RAW_PREFIX), pattern, values(raw))
        for raw, pattern in zip(conversion.sources, conversion.patterns, strict=True)
    ]
