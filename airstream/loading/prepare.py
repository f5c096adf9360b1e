"""From what the user named to everything that is known about a model before its first weight is read.

Knows in which order headers, config, class and sizes are found out. Refuses to know what is made of them: a plan, a
table, or a running model.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from airstream.checkpoint.config_file import read_config_file
from airstream.checkpoint.formats import has_weights, open_checkpoint
from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.locate import locate
from airstream.checkpoint.safetensors import CheckpointIndex
from airstream.compat.blame import Consequences, blamed_on
from airstream.compat.building import build_on_meta
from airstream.compat.classes import choose_class
from airstream.compat.gguf import gguf_config, gguf_dtype
from airstream.compat.quantizers import Quantizer, find_quantizer
from airstream.compat.remote import check_trust
from airstream.compat.suspects import advice, names_a_field
from airstream.compat.traits import CacheSize, measure_cache
from airstream.errors import ArgumentError, CheckpointError, CheckpointNotFoundError, UnsupportedError
from airstream.footprint.activations import measure_passes
from airstream.footprint.growth import PassGrowth
from airstream.layout.byte_plan import read_specs
from airstream.layout.imagined import imagine
from airstream.layout.parts import Parts, divide
from airstream.layout.pieces import TORCH_DTYPES
from airstream.loading.arguments import adopt
from airstream.loading.gather import gather_facts, needs_staging
from airstream.loading.machine import PROMPT_TOKENS, THIS_MACHINE, Machine, Question, request_for
from airstream.loading.options import LoadOptions, check_count, named_dtype, parse_max_memory
from airstream.plan.facts import ModelFacts
from airstream.plan.request import Request
from airstream.system.kernels import KernelLimit
from airstream.transfer.backends import packing_of

STEPS = ("finding the checkpoint", "reading headers", "building the model", "planning")
"""Of `prepare`, as it begins them."""

DEFAULTS: Mapping[str, Any] = {option.name: option.default for option in fields(LoadOptions)}
_PLAN_DEFAULTS: Mapping[str, Any] = {**DEFAULTS, "machine": THIS_MACHINE, "prompt_tokens": None}


@dataclass(frozen=True)
class Prepared:
    """Everything known about a model before the first weight is read."""

    options: LoadOptions
    folder: Path
    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    index: CheckpointIndex
    parts: Parts
    facts: ModelFacts
    question: Question
    request: Request
    quantizer: Quantizer | None = None


def ask(
    name: str | os.PathLike[str],
    options: Mapping[str, Any],
    machine: Machine = THIS_MACHINE,
    prompt_tokens: int | None = None,
) -> Prepared:
    """The sizes of a model and what is asked of the planner, weights or not. Arguments as `AutoModel.plan`."""
    given = {key: value for key, value in options.items() if key in DEFAULTS}
    foreign = {key: value for key, value in options.items() if key not in DEFAULTS}
    known = LoadOptions(**adopt(foreign, given, _PLAN_DEFAULTS))
    if prompt_tokens is not None:
        check_count("prompt_tokens", prompt_tokens, at_least=1)
        if prompt_tokens > (known.max_context or prompt_tokens):
            raise ArgumentError(
                f"a prompt of prompt_tokens={prompt_tokens} does not fit into max_context={known.max_context}"
            )
    return prepare(name, known, with_weights=False, machine=machine, prompt_tokens=prompt_tokens or PROMPT_TOKENS)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Without Python's cyclic garbage collector: a hundred thousand small objects that stay would wake it again and
    again, and it would look at all of torch and transformers, and find nothing. That is a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collecting()
def prepare(
    name: str | os.PathLike[str],
    options: LoadOptions,
    with_weights: bool = True,
    machine: Machine = THIS_MACHINE,
    prompt_tokens: int = PROMPT_TOKENS,
    begin: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Find out everything about the model `name`. `begin` is told each of `STEPS` but the first."""
    device = machine.device(options.device)
    parse_max_memory(options.max_memory, device)  # a mistake in it is told before anything is downloaded
    folder, gguf = locate(
        name,
        options.gguf_file,
        subfolder=options.subfolder,
        variant=options.variant,
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
        with_code=options.trust_remote_code,
        with_weights=with_weights,
    )
    begin(STEPS[1])
    index: CheckpointIndex | None
    if gguf is not None:
        if options.variant is not None:
            raise ArgumentError(f"variant={options.variant!r} is of safetensors: name the GGUF file with gguf_file=...")
        index = GgufIndex.open(gguf)
    else:
        has_any = with_weights or has_weights(folder, options.variant)
        index = open_checkpoint(folder, variant=options.variant) if has_any else None
    if index is not None and not index:
        raise CheckpointError(f"{gguf or folder} has no tensors: its files of weights are empty. Download it again")
    begin(STEPS[2])
    model, dtype, quantizer, cache, passes = build_model(folder, options, device, index)
    begin(STEPS[3])
    index = index or imagine(model)
    parts = divide(model, read_specs(model, index, dtype, quantizer))
    packing = packing_of(device)
    facts = gather_facts(
        os.fspath(name), folder, model, parts, device, packing, options.layers_per_batch, cache, passes
    )
    facts = replace(facts, num_tensors=len(index))
    staged = device.type != "cpu" or needs_staging(parts, packing)
    question = Question(options, machine, folder, device, staged, prompt_tokens)
    request = request_for(question, facts)
    return Prepared(options, folder, device, dtype, model, index, parts, facts, question, request, quantizer)


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
        quantizer: of the checkpoint, if it is quantised.
        cache: what its KV cache grows to, if that could be measured.
        passes: what its passes allocate, likewise.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    quantizer: Quantizer | None
    cache: CacheSize | None
    passes: tuple[PassGrowth, ...]


def build_model(folder: Path, options: LoadOptions, device: torch.device, index: CheckpointIndex | None) -> Built:
    """The model that the config in `folder` describes, with the modules that compute with its weights on `device`."""
    if isinstance(index, GgufIndex):
        config = gguf_config(index)
        with blamed_on(f"no model can be built from {index.first}"):
            return _build(config, index.first, options, device, index)
    file = folder / "config.json"
    values = _read_config(folder, options)
    find = partial(_find_fault, values, lambda config: _build(config, file, options, device, index))
    with blamed_on(f"transformers cannot read {file}", _READING, find):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    with blamed_on(f"no model can be built from {file}", advice=find):
        return _build(config, file, options, device, index)


def _build(
    config: PreTrainedConfig, source: Path, options: LoadOptions, device: torch.device, index: CheckpointIndex | None
) -> Built:
    quantizer = find_quantizer(config, device)
    dtype = _resolve_dtype(options.dtype, config, index)
    dtype = quantizer.dtype(dtype) if quantizer is not None else dtype
    if device.type == "cpu":
        KernelLimit(dtype).set()  # before any product: building a model may make some
    model_cls, config = choose_class(config, source.parent, options.trust_remote_code, options.model_class)
    with _attention(options.attn_implementation, source):
        model = build_on_meta(model_cls, config, dtype, options.attn_implementation)
    cache, passes = measure_cache(model), measure_passes(model, device)  # while its modules compute on any device
    if quantizer is not None:
        _check_planned_from_headers(index, quantizer)
        quantizer.preprocess(model, dtype, device, index.files if index is not None else ())
    return Built(model, dtype, quantizer, cache, passes)


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
            raise ArgumentError(f"attn_implementation={wanted!r}: {error}") from error
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
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not file.is_file():
        raise CheckpointNotFoundError(
            f"{folder} is an adapter, not a model: load the model that it was trained with, and then "
            f"model.load_adapter({os.fspath(folder)!r})"
        )
    values = read_config_file(file)
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
        return config.dtype
    stored = (TORCH_DTYPES[tensor.dtype] for tensor in (index or {}).values())
    return next((candidate for candidate in stored if candidate.is_floating_point), torch.get_default_dtype())
