"""This quantises weights in the formats that transformers loads, by the libraries that it loads them with.

A codec is a row of a table: what a few rows of a weight become, what belongs to the weight as a whole, and what
`config.json` says of it. All formats work row by row, so that a weight need not be in memory to be quantised, and run
on the meta device, where they say what comes out without a value being known.

It knows weights. It refuses to know which weights of a model are quantised, and where they lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from airstream.codecs.names import codec_named
from airstream.compat.four_bit import NF4_BLOCK, ROWS_PACKED_ANEW
from airstream.compat.four_bit_numbers import nf4_numbers
from airstream.compat.quant_codec import SCALES, QuantCodec, Tensors, check_package
from airstream.reporting.extras import install

ROW_STEP = 128
"""A weight may be cut behind any multiple of so many rows: no format shares anything among more of them."""

FP8_BLOCK = 128
"""Rows and columns that share a scale, as in DeepSeek-V3."""

INT4_GROUP = 128
"""Columns that share a scale."""


def find_codec(name: str) -> QuantCodec:
    """The codec called `name`.

    Raises:
        ArgumentError: there is none.
        UnsupportedError: the package that it takes is not there; the message says what to install.
    """
    codec = CODECS[codec_named(name)]
    check_package(codec)
    return codec


# -------------------------------------------------------------------------------------------------- bitsandbytes: nf4


def _nf4_settings(dtype: torch.dtype) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype).to_dict()


def four_bit_rows(rows: torch.Tensor, kind: str = "nf4", storage: torch.dtype = torch.uint8) -> Tensors:
    """Numbers of 4 bits, of the `kind` "nf4" or "fp4", and their scales. They are called numbers of type `storage`."""
    if kind == "nf4" and storage == torch.uint8 and (made := nf4_numbers(rows)):
        return {"weight": made[0], SCALES: made[1]}
    packed, state = _four_bit(rows, kind, storage)
    return {"weight": packed, SCALES: state.absmax}


def four_bit_weight(weight: torch.Tensor, kind: str = "nf4") -> Tensors:
    """What bitsandbytes says of a weight in numbers of 4 bits."""
    state = four_bit_state(weight, kind)
    return {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items() if name != "absmax"}


def four_bit_state(weight: torch.Tensor, kind: str) -> Any:
    """What bitsandbytes knows of a weight in numbers of 4 bits, without the scales."""
    _, state = _four_bit(torch.zeros(NF4_BLOCK, dtype=weight.dtype, device="cpu"), kind)
    state.shape = weight.shape
    return state


def _four_bit(numbers: torch.Tensor, kind: str, storage: torch.dtype = torch.uint8) -> Any:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(
        numbers, blocksize=NF4_BLOCK, quant_type=kind, compress_statistics=False, quant_storage=storage
    )


def _fits_four_bits(shape: tuple[int, ...]) -> bool:
    """Whether bitsandbytes computes with a weight of `shape` on every processor."""
    return len(shape) == 2 and not shape[0] % ROWS_PACKED_ANEW and not shape[1] % NF4_BLOCK


# ------------------------------------------------------------------------------------------------------- torchao: int8


def _int8_settings(_: torch.dtype) -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig()).to_dict()


def _int8_config() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)  # which would change settings of the whole process


def torchao_rows(rows: torch.Tensor, config: Callable[[], Any] = _int8_config) -> Tensors:
    """What torchao makes of `rows`, as the object says that `config` gives."""
    return {name.removeprefix("module."): tensor for name, tensor in _by_torchao(rows, config())[0].items()}


def torchao_attributes(weight: torch.Tensor, config: Callable[[], Any] = _int8_config) -> str:
    """What torchao needs to know of a weight."""
    return str(_by_torchao(weight, config())[1]["module.weight"])


def _by_torchao(weight: torch.Tensor, config: Any) -> tuple[Tensors, dict[str, str]]:
    """The tensors of `weight`, and what torchao needs to know of them."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    module = nn.Linear(1, 1, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(module, config, lambda *_: True)
    made = flatten_tensor_state_dict({"module.weight": module.weight.data})
    del module.weight  # torchao ties the module to itself, and the weight would stay until somebody collects it
    return made


# -------------------------------------------------------------------------------------------------- transformers: fp8


def _fp8_settings(_: torch.dtype) -> dict[str, Any]:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(weight_block_size=(FP8_BLOCK, FP8_BLOCK)).to_dict()


def fp8_rows(rows: torch.Tensor, block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK)) -> Tensors:
    """Numbers of e4m3, and a scale for each `block` of rows and columns."""
    made = _fp8(block).convert({"module.weight": rows})
    return {name.removeprefix("module."): tensor for name, tensor in made.items()}


@cache
def _fp8(block: tuple[int, int]) -> Any:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    return Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=block)))


def fits_fp8(shape: tuple[int, ...], block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK)) -> bool:
    """Whether a weight of `shape` is whole blocks."""
    return len(shape) == 2 and not shape[0] % block[0] and not shape[1] % block[1]


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
        four_bit_rows,
        four_bit_weight,
        fits=_fits_four_bits,
        takes=f"a multiple of {ROWS_PACKED_ANEW} rows and of {NF4_BLOCK} columns",
    ),
    QuantCodec(
        "int8",
        "torchao",
        install("torchao", "quant"),
        "modules_to_not_convert",
        _int8_settings,
        torchao_rows,
        attributes=torchao_attributes,
        leaf=".weight",
    ),
    QuantCodec(
        "fp8",
        None,
        "",
        "modules_to_not_convert",
        _fp8_settings,
        fp8_rows,
        fits=fits_fp8,
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
