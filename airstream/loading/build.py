"""This builds a checkpoint's model without weights: what its config describes, with the modules that compute.

It knows whose fault it is that no model can be built. It refuses to know sizes and plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from airstream.checkpoint.config_file import read_model_config
from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.stored import CheckpointIndex
from airstream.compat.blame import Consequences, blamed_on
from airstream.compat.building import attention_names, build_on_meta
from airstream.compat.classes import choose_class
from airstream.compat.gguf import gguf_config, gguf_dtype
from airstream.compat.packed_linear import check_fast, put_packed_linears, take_packed_linears_out
from airstream.compat.quantizer import Quantizer
from airstream.compat.quantizers import find_quantizer
from airstream.compat.remote import check_trust
from airstream.compat.suspects import advice, names_a_field
from airstream.compat.traits import CacheSize, measure_cache
from airstream.errors import ArgumentError, CheckpointError, UnsupportedError
from airstream.footprint.activations import measure_passes
from airstream.footprint.growth import PassGrowth
from airstream.layout.imagined_checkpoint import Imagined
from airstream.layout.pieces import TORCH_DTYPES
from airstream.layout.stored_rows import hold_stored_rows
from airstream.loading.options import COMPUTE_DTYPES, FAST, LoadOptions, named_dtype
from airstream.system.kernels import KernelLimit


def _check_planned_from_headers(index: CheckpointIndex | None, quantizer: Quantizer) -> None:
    """What a quantised checkpoint holds is in its headers alone: a config does not say how each tensor is packed."""
    if index is None:
        raise UnsupportedError(
            f"the model is quantised with {quantizer.method}, and only its config is here: planning needs the headers "
            "of its weights. Download the checkpoint first"
        )


class Built(NamedTuple):
    """A model on the meta device, the dtype of its weights, and what was found out on the way.

    Attributes:
        quantizer: the quantizer of the checkpoint, if it is quantised, and is to be streamed as transformers loads it.
        checkpoint: its tensors, as modules take them.
        cache: what its KV cache grows to, if that could be measured.
        passes: what its passes allocate, likewise.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    quantizer: Quantizer | None
    checkpoint: CheckpointIndex | None
    cache: CacheSize | None
    passes: tuple[PassGrowth, ...]


class _Known(NamedTuple):
    """What `build_model` is told besides."""

    is_measured: bool
    has_fp8: bool | None


def build_model(
    folder: Path,
    options: LoadOptions,
    device: torch.device,
    index: CheckpointIndex | None,
    imagined: Imagined | None = None,
    is_measured: bool = True,
    has_fp8: bool | None = None,
) -> Built:
    """The model that the config in `folder` describes, with the modules that compute with its weights on `device`.

    Args:
        index: of its weights, if they are there.
        imagined: the checkpoint that is meant instead, with the same config but for what that says.
        is_measured: find out about its cache and its passes.
        has_fp8: whether `device` multiplies FP8, if it is only described.
    """
    known = _Known(is_measured, has_fp8)
    build = partial(_build, options=options, device=device, index=index, imagined=imagined, known=known)
    if isinstance(index, GgufIndex):
        config = gguf_config(index)
        with blamed_on(f"no model can be built from {index.first}"):
            return build(config, index.first)
    file = folder / "config.json"
    values = _read_config(folder, options)
    find = partial(_find_fault, values, lambda config: build(config, file))
    with blamed_on(f"transformers cannot read {file}", _READING, find):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    with blamed_on(f"no model can be built from {file}", advice=find):
        return build(config, file)


def _build(
    config: PreTrainedConfig,
    source: Path,
    options: LoadOptions,
    device: torch.device,
    index: CheckpointIndex | None,
    imagined: Imagined | None,
    known: _Known,
) -> Built:
    if imagined is not None:
        index = imagined.index
        if imagined.settings is not None:
            config.quantization_config = dict(imagined.settings)
            config.dtype = config.dtype or imagined.dtype
    quantizer = find_quantizer(config, device, known.has_fp8)
    dtype = _resolve_dtype(options.dtype, config, index)
    dtype = quantizer.dtype(dtype) if quantizer is not None else dtype
    if device.type == "cpu":
        KernelLimit(dtype).set()  # before any product: building a model may make some
    model_cls, config = choose_class(config, source.parent, options.trust_remote_code, options.model_class)
    with _attention(options.attn_implementation, source):
        model = build_on_meta(model_cls, config, dtype, options.attn_implementation)
    if options.kernels == FAST:
        check_fast(device, dtype)
        put_packed_linears(model)
        if quantizer is not None and index is not None:
            quantizer.check(index)
            if (rows := hold_stored_rows(model, index, quantizer.method, quantizer.settings)) is not None:
                index, quantizer = rows, None
    cache = measure_cache(model) if known.is_measured else None  # while its modules compute on any device
    passes = measure_passes(model, device) if known.is_measured else ()
    if quantizer is not None:
        _check_planned_from_headers(index, quantizer)
        files = index.files if index is not None else ()
        take_packed_linears_out(model)  # it puts modules of its own in the place of plain ones
        quantizer.preprocess(model, dtype, device, files if imagined is None else imagined.headers)
        quantizer.settle(model, index or {})
        if options.kernels == FAST:
            put_packed_linears(model)
    return Built(model, dtype, quantizer, index, cache, passes)


def _find_fault(values: Mapping[str, Any], build: Callable[[PreTrainedConfig], Built], said: str) -> str:
    """Which field of a config no model can be built with, which fails with the words `said`."""
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING or names_a_field(said, values):
        return ""
    cls = CONFIG_MAPPING[model_type]
    return advice(values, cls().to_dict(), lambda others: build(cls.from_dict(others)))


@contextmanager
def _attention(wanted: str | None, source: Path) -> Iterator[None]:
    """Where a model is built: what fails because of the attention that the user wants is not the file's fault."""
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(_needs_package(wanted, source, error)) from error
    except ValueError as error:
        if wanted is not None and "attn_implementation" in str(error):
            names = attention_names()
            said = str(error) if wanted in names else f"there is none of that name, but {', '.join(names)}"
            raise ArgumentError(f"attn_implementation={wanted!r}: {said}") from error
        raise


def _needs_package(attn_implementation: str | None, source: Path, error: ImportError) -> str:
    if attn_implementation is None:
        return f"the model of {source} needs a package that is not installed here: {error}"
    return (
        f"attn_implementation={attn_implementation!r} needs a package that is not installed here: "
        f'{str(error).rstrip(".")}. Install it, or leave the argument out: torch brings "sdpa"'
    )


_READING: Consequences = (((OSError, ValueError, KeyError, ImportError), UnsupportedError),)
"""A type of model that transformers does not know is one of these."""


def _read_config(folder: Path, options: LoadOptions) -> dict[str, Any]:
    values = read_model_config(folder)
    check_trust(values, folder, options.trust_remote_code)
    return values


def _resolve_dtype(dtype: str | torch.dtype, config: PreTrainedConfig, index: CheckpointIndex | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return named_dtype(dtype)
    if isinstance(index, GgufIndex):
        return gguf_dtype(index)
    if config.dtype is not None:
        if config.dtype not in COMPUTE_DTYPES:
            raise CheckpointError(
                f"the config has dtype {config.dtype}, which no model computes in: name one that does, as in "
                'dtype="bfloat16"'
            )
        return config.dtype
    stored = (TORCH_DTYPES[tensor.dtype] for tensor in (index or {}).values())
    return next((candidate for candidate in stored if candidate in COMPUTE_DTYPES), torch.get_default_dtype())
