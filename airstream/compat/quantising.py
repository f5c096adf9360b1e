"""This quantises weights in the formats that transformers loads, by the libraries that it loads them with.

A codec is a row of a table: what a few rows of a weight become, what belongs to the weight as a whole, and what
`config.json` says of it. All formats work row by row, so that a weight need not be in memory to be quantised, and run
on the meta device, where they say what comes out without a value being known.

It knows weights. It refuses to know which weights of a model are quantised, and where they lie.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from airstream.codecs.names import codec_named
from airstream.errors import UnsupportedError
from airstream.reporting.extras import install
from airstream.system.importing import quiet_imports

Tensors = dict[str, torch.Tensor]
"""By what their names end with: what follows the name of the module."""

ROW_STEP = 128
"""A weight may be cut behind any multiple of so many rows: no format shares anything among more of them."""

NF4_BLOCK = 64
"""Numbers that share a scale, one behind the other, whichever rows they are in."""

FP8_BLOCK = 128
"""Rows and columns that share a scale, as in DeepSeek-V3."""

INT4_GROUP = 128
"""Columns that share a scale."""


@dataclass(frozen=True, slots=True)
class QuantCodec:
    """One format of quantised weights.

    Attributes:
        module: what is imported to quantise, and to load the result; None if transformers alone does both.
        missing: what to type if it is not there; accelerate, which transformers asks for besides, comes with it.
        skipped: the field of its settings that lists modules which stay as they are.
        settings: what `config.json` says, for a model that computes in a dtype.
        of_rows: what `ROW_STEP` rows, or a multiple, become, by the ends of their names. What all rows become is that,
            one behind the other.
        of_weight: what belongs to the whole weight.
        attributes: what the header of a file says of the whole weight, under the model's name for it.
        fits: whether a weight of a shape can be quantised.
        takes: the same in words.
        lists_all: whether its settings have to list every module that stays as it is.
        takes_experts: whether transformers loads experts of it, which are one tensor in the model.
    """

    name: str
    module: str | None
    missing: str
    skipped: str
    settings: Callable[[torch.dtype], dict[str, Any]]
    of_rows: Callable[[torch.Tensor], Tensors]
    of_weight: Callable[[torch.Tensor], Tensors] = lambda weight: {}  # noqa: ARG005 - most have nothing
    attributes: Callable[[torch.Tensor], str | None] = lambda weight: None  # noqa: ARG005 - most have none
    fits: Callable[[tuple[int, ...]], bool] = lambda shape: len(shape) == 2
    takes: str = "any number of rows and columns"
    lists_all: bool = False
    takes_experts: bool = False

    def outputs(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
        """What a weight becomes: tensors without values."""
        weight = torch.empty(shape, dtype=dtype, device="meta")
        return {end: tensor.to("meta") for end, tensor in (self.of_rows(weight) | self.of_weight(weight)).items()}


def find_codec(name: str) -> QuantCodec:
    """The codec called `name`.

    Raises:
        ArgumentError: there is none.
        UnsupportedError: the package that it takes is not there; the message says what to install.
    """
    codec = CODECS[codec_named(name)]
    if codec.module is not None and importlib.util.find_spec(codec.module) is None:
        raise UnsupportedError(f"codec={name!r} needs the package {codec.module}: {codec.missing}")
    if codec.module is not None:
        with quiet_imports():
            importlib.import_module(codec.module)
    return codec


# -------------------------------------------------------------------------------------------------- bitsandbytes: nf4


def _nf4_settings(dtype: torch.dtype) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype).to_dict()


def _nf4_rows(rows: torch.Tensor) -> Tensors:
    packed, state = _nf4(rows)
    return {"weight": packed, "weight.absmax": state.absmax}


def _nf4_weight(weight: torch.Tensor) -> Tensors:
    _, state = _nf4(torch.zeros(NF4_BLOCK, dtype=weight.dtype, device="cpu"))
    state.shape = weight.shape
    return {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items() if name != "absmax"}


def _nf4(numbers: torch.Tensor) -> Any:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(numbers, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)


# ------------------------------------------------------------------------------------------------------- torchao: int8


def _int8_settings(_: torch.dtype) -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig()).to_dict()


def _int8_rows(rows: torch.Tensor) -> Tensors:
    return {name.removeprefix("module."): tensor for name, tensor in _int8(rows)[0].items()}


def _int8_attributes(weight: torch.Tensor) -> str:
    return str(_int8(weight)[1]["module.weight"])


def _int8(weight: torch.Tensor) -> tuple[Tensors, dict[str, str]]:
    """The tensors of `weight`, and what torchao needs to know of them."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = nn.Linear(1, 1, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    config = Int8WeightOnlyConfig(set_inductor_config=False)  # which would change settings of the whole process
    quantize_(module, config, lambda *_: True)
    made = flatten_tensor_state_dict({"module.weight": module.weight.data})
    del module.weight  # torchao ties the module to itself, and the weight would stay until somebody collects it
    return made


# -------------------------------------------------------------------------------------------------- transformers: fp8


def _fp8_settings(_: torch.dtype) -> dict[str, Any]:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(weight_block_size=(FP8_BLOCK, FP8_BLOCK)).to_dict()


def _fp8_rows(rows: torch.Tensor) -> Tensors:
    return {name.removeprefix("module."): tensor for name, tensor in _fp8().convert({"module.weight": rows}).items()}


@cache
def _fp8() -> Any:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    return Fp8Quantize(
        SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(FP8_BLOCK, FP8_BLOCK)))
    )


def _fits_fp8(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and not any(size % FP8_BLOCK for size in shape)


# --------------------------------------------------------------------------------------------- compressed-tensors: int4


def _int4_settings(_: torch.dtype) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(
        config_groups={"group_0": _int4_scheme()}, format="pack-quantized", quantization_status="compressed"
    )
    return dict(json.loads(config.model_dump_json()))


def _int4_rows(rows: torch.Tensor) -> Tensors:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _int4_scheme()
    groups = rows.reshape(len(rows), -1, INT4_GROUP)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    made = PackedQuantizationCompressor.compress({"weight": rows, "weight_scale": scale}, scheme)
    return {name: made[name] for name in ("weight_packed", "weight_scale")}


def _int4_weight(weight: torch.Tensor) -> Tensors:
    return {"weight_shape": torch.tensor(weight.shape, dtype=torch.long, device="cpu")}


@cache
def _int4_scheme() -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=INT4_GROUP)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _fits_int4(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[1] % INT4_GROUP == 0


_ROWS = (
    QuantCodec(
        "nf4",
        "bitsandbytes",
        install("bitsandbytes", "quant"),
        "llm_int8_skip_modules",
        _nf4_settings,
        _nf4_rows,
        _nf4_weight,
    ),
    QuantCodec(
        "int8",
        "torchao",
        install("torchao", "quant"),
        "modules_to_not_convert",
        _int8_settings,
        _int8_rows,
        attributes=_int8_attributes,
    ),
    QuantCodec(
        "fp8",
        None,
        "",
        "modules_to_not_convert",
        _fp8_settings,
        _fp8_rows,
        fits=_fits_fp8,
        takes=f"a multiple of {FP8_BLOCK} rows and of {FP8_BLOCK} columns",
        takes_experts=True,
    ),
    QuantCodec(
        "int4",
        "compressed_tensors",
        install("compressed-tensors", "quant"),
        "ignore",
        _int4_settings,
        _int4_rows,
        _int4_weight,
        fits=_fits_int4,
        takes=f"a multiple of {INT4_GROUP} columns",
        lists_all=True,
    ),
)

CODECS: Mapping[str, QuantCodec] = {codec.name: codec for codec in _ROWS}
"""By name. They are listed in docs/quantized.md, with what else was tried in docs/log.md."""
