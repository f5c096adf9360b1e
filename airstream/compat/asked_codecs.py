"""This makes a codec of what an object of transformers asks for, where what it would make of a weight can be packed.

The library that the object belongs to quantises, as it would with the whole model in memory: what comes out is the same
to the bit. What cannot be had is refused, with the field, its value, and the nearest codec that can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch

from airstream.compat.asked_formats import AskedFormat
from airstream.compat.quant_codec import QuantCodec, Tensors, check_package
from airstream.compat.quantising import (
    CODECS,
    ROW_STEP,
    find_codec,
    fits_fp8,
    four_bit_rows,
    four_bit_state,
    four_bit_weight,
    fp8_rows,
    torchao_attributes,
    torchao_rows,
)
from airstream.errors import UnsupportedError
from airstream.reporting.units import counted

__all__ = ["codec_for"]

COMPUTE_DTYPES = ("bfloat16", "float16", "float32")

NESTED_BLOCK = 256
"""Scales that share a scale of their own."""

NUMBER_ROOM = 24
"""Letters of the longest number that JSON has for a float."""

BY_ROWS = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
)
"""torchao's formats that work row by row, and on a CPU."""


def codec_for(asked: str | AskedFormat) -> QuantCodec:
    """The codec that is `asked` for, by name or by an object.

    Raises:
        ArgumentError: there is none of that name.
        UnsupportedError: it cannot be had, or a package is missing; the message says what to do.
    """
    if isinstance(asked, str):
        return find_codec(asked)
    make = _METHODS.get(asked.method)
    if make is None:
        raise UnsupportedError(
            f"{asked} has quant_method={asked.method!r}, which is not made while a checkpoint is loaded: name one "
            "that is quantised so already, or give a BitsAndBytesConfig, TorchAoConfig or FineGrainedFP8Config; the "
            f'nearest codec is compression="{_nearest(asked.settings)}"'
        )
    codec = make(asked, asked.settings)
    codec = replace(codec, settings=lambda _: asked.settings, is_asked_for=True)
    check_package(codec)
    return codec


def _nearest(settings: Mapping[str, Any]) -> str:
    """The codec of as many bits."""
    is_eight = settings.get("bits", settings.get("nbits", 4)) == 8 or "8" in str(settings.get("weights"))
    return "int8" if is_eight else "int4"


def _refuse(asked: AskedFormat, field: str, value: Any, instead: str, why: str = "which is not supported") -> NoReturn:
    raise UnsupportedError(f'{asked} has {field}={value!r}, {why}: the nearest codec is compression="{instead}"')


# ------------------------------------------------------------------------------------------------------- bitsandbytes


_OF_ANY_SHAPE = replace(CODECS["nf4"], fits=lambda shape: len(shape) == 2, takes="any number of rows and columns")
"""As transformers packs: which processors compute with it is found out when it is loaded."""


def _bitsandbytes(asked: AskedFormat, settings: Mapping[str, Any]) -> QuantCodec:
    if settings["load_in_8bit"]:
        if settings["llm_int8_has_fp16_weight"]:
            _refuse(asked, "llm_int8_has_fp16_weight", True, "int8", "which packs nothing")
        return replace(_OF_ANY_SHAPE, name="llm-int8", of_rows=_eight_bit_rows, of_weight=_eight_bit_weight)
    if not settings["load_in_4bit"]:
        _refuse(asked, "load_in_4bit", False, "nf4", "and load_in_8bit=False, which asks for nothing")
    kind, storage = settings["bnb_4bit_quant_type"], settings["bnb_4bit_quant_storage"]
    is_nested = settings["bnb_4bit_use_double_quant"]
    if kind not in ("nf4", "fp4"):
        _refuse(asked, "bnb_4bit_quant_type", kind, "nf4", "where bitsandbytes has 'nf4' and 'fp4'")
    if settings["bnb_4bit_compute_dtype"] not in COMPUTE_DTYPES:
        _refuse(asked, "bnb_4bit_compute_dtype", settings["bnb_4bit_compute_dtype"], "nf4")
    return replace(
        _OF_ANY_SHAPE,
        name=kind,
        of_rows=partial(four_bit_rows, kind=kind, storage=getattr(torch, storage)),
        of_weight=_nothing if is_nested else partial(four_bit_weight, kind=kind),
        of_scales=partial(_nested_scales, kind=kind) if is_nested else None,
    )


def _nothing(_: torch.Tensor) -> Tensors:
    return {}


def _eight_bit_rows(rows: torch.Tensor) -> Tensors:
    from bitsandbytes.functional import int8_vectorwise_quant

    packed, scales, _ = int8_vectorwise_quant(rows.to(torch.float16))  # as its Int8Params does
    return {"weight": packed, "SCB": scales}


def _eight_bit_weight(_: torch.Tensor) -> Tensors:
    by_rows = torch.tensor(0, dtype=torch.uint8, device="cpu")  # the only format that it writes today
    return {"weight_format": by_rows}


def _nested_scales(weight: torch.Tensor, scales: torch.Tensor, kind: str) -> Tensors:
    """The `scales` of `weight`, all of them, as bitsandbytes quantises them again, by blocks of their own.

    What says so is text with a number in it, whose length is known with the values alone: spaces make it up to the
    longest that it can be, which JSON allows.
    """
    from bitsandbytes.functional import quantize_blockwise

    state = four_bit_state(weight, kind)
    state.nested, state.offset = True, scales.mean()
    state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=NESTED_BLOCK)
    made = {f"weight.{end}": tensor for end, tensor in state.as_dict(packed=True).items()}
    said = next(end for end in made if "quant_state" in end)
    room = NUMBER_ROOM - len(repr(state.offset.item()))
    made[said] = torch.cat([made[said], torch.full((room,), ord(" "), dtype=torch.uint8, device="cpu")])
    return made


# ------------------------------------------------------------------------------------------------------------ torchao


def _torchao(asked: AskedFormat, settings: Mapping[str, Any]) -> QuantCodec:
    wanted = asked.config().quant_type
    kind = type(wanted).__name__
    nearest = "int4" if "4" in kind else "fp8" if kind.startswith("Float8") else "int8"
    for field in ("include_input_output_embeddings", "untie_embedding_weights"):
        if settings[field]:
            _refuse(asked, field, True, nearest, "and embeddings are not packed")
    if kind not in BY_ROWS:
        _refuse(asked, "quant_type", wanted, nearest, "which cannot be made row by row on a CPU")
    grain = getattr(wanted, "granularity", None)
    if not (grain is None or type(grain).__name__ in ("PerRow", "PerGroup") or getattr(grain, "axis", None) == 0):
        _refuse(asked, "granularity", grain, nearest, "which cannot be made row by row")
    width = getattr(grain, "group_size", 1)
    if hasattr(wanted, "set_inductor_config"):
        wanted = replace(wanted, set_inductor_config=False)  # which would change settings of the whole process
    return replace(
        CODECS["int8"],
        name=kind.removesuffix("Config"),
        of_rows=partial(torchao_rows, config=lambda: wanted),
        attributes=partial(torchao_attributes, config=lambda: wanted),
        fits=lambda shape: len(shape) == 2 and not shape[1] % width,
        takes=f"a multiple of {counted(width, 'column')}",
    )


# --------------------------------------------------------------------------------------------------- fine-grained FP8

FP8_DEFAULTS: Mapping[str, Any] = {
    "activation_scheme": "dynamic", "dequantize": False, "modules_to_convert": None, "scale_fmt": "float",
    "expert_dtype": "fp8",
}  # fmt: skip
"""What other values of would be another format, or none."""


def _fp8(asked: AskedFormat, settings: Mapping[str, Any]) -> QuantCodec:
    for field, value in FP8_DEFAULTS.items():
        if settings[field] != value:
            _refuse(asked, field, settings[field], "fp8")
    block = settings["weight_block_size"]
    if block is None or ROW_STEP % block[0]:
        _refuse(asked, "weight_block_size", block, "fp8", f"of which rows have to divide {ROW_STEP}")
    rows, columns = block
    return replace(
        CODECS["fp8"],
        of_rows=partial(fp8_rows, block=(rows, columns)),
        fits=partial(fits_fp8, block=(rows, columns)),
        takes=f"a multiple of {counted(rows, 'row')} and of {counted(columns, 'column')}",
    )


_METHODS: Mapping[str, Callable[[AskedFormat, Mapping[str, Any]], QuantCodec]] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "fp8": _fp8,
}
"""By method, what makes a codec of an object's fields."""
