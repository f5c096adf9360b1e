"""From what the user named to everything that is known about a model before its first weight is read.

Knows in which order headers, config, class and sizes are found out. Refuses to know what is made of them: a plan, a
table, or a running model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from airstream.backend import packing_of
from airstream.checkpoint.hub import resolve
from airstream.checkpoint.imagined import imagine
from airstream.checkpoint.index import CheckpointIndex, has_weights
from airstream.compat import build_on_meta, check_trust, model_class
from airstream.config import LoadOptions, check_count, parse_max_memory, refuse_unknown
from airstream.errors import ArgumentError, CheckpointError, CheckpointNotFoundError, UnsupportedError
from airstream.layout import TORCH_DTYPES, read_specs
from airstream.machine import PROMPT_TOKENS, THIS_MACHINE, Machine, Question, request_for
from airstream.model.facts import gather_facts, needs_staging
from airstream.model.units import Parts, divide
from airstream.plan import ModelFacts, Request

OPTION_NAMES = tuple(option.name for option in fields(LoadOptions))
_PLAN_NAMES = (*OPTION_NAMES, "machine", "prompt_tokens")


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


def ask(
    name: str | os.PathLike[str],
    options: Mapping[str, Any],
    machine: Machine = THIS_MACHINE,
    prompt_tokens: int | None = None,
) -> Prepared:
    """The sizes of a model and what is asked of the planner, weights or not. Arguments as `AutoModel.plan`."""
    refuse_unknown((name for name in options if name not in OPTION_NAMES), _PLAN_NAMES)
    known = LoadOptions(**options)
    if prompt_tokens is not None:
        check_count("prompt_tokens", prompt_tokens, at_least=1)
        if prompt_tokens > (known.max_context or prompt_tokens):
            raise ArgumentError(
                f"a prompt of prompt_tokens={prompt_tokens} does not fit into max_context={known.max_context} tokens"
            )
    return prepare(name, known, with_weights=False, machine=machine, prompt_tokens=prompt_tokens or PROMPT_TOKENS)


def prepare(
    name: str | os.PathLike[str],
    options: LoadOptions,
    with_weights: bool = True,
    machine: Machine = THIS_MACHINE,
    prompt_tokens: int = PROMPT_TOKENS,
) -> Prepared:
    device = machine.device(options.device)
    parse_max_memory(options.max_memory, device)  # a mistake in it is told before anything is downloaded
    folder = resolve(
        name,
        options.revision,
        options.token,
        options.cache_dir,
        options.local_files_only,
        with_code=options.trust_remote_code,
        with_weights=with_weights,
    )
    config = _load_config(folder, options)
    index = CheckpointIndex.open(folder) if with_weights or has_weights(folder) else None
    dtype = _resolve_dtype(options.dtype, config, index)
    model_cls = model_class(config, folder, options.trust_remote_code)
    model = build_on_meta(model_cls, config, dtype, options.attn_implementation)
    index = index or imagine(model)
    parts = divide(model, read_specs(model, index, dtype))
    packing = packing_of(device)
    facts = gather_facts(os.fspath(name), folder, model, parts, device, packing, options.layers_per_batch)
    staged = device.type != "cpu" or needs_staging(parts, packing)
    question = Question(options, machine, folder, device, staged, prompt_tokens)
    request = request_for(question, facts)
    return Prepared(options, folder, device, dtype, model, index, parts, facts, question, request)


def _load_config(folder: Path, options: LoadOptions) -> PreTrainedConfig:
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not file.is_file():
        raise CheckpointNotFoundError(
            f"{folder} is an adapter, not a model: load the model that it was trained with, and then "
            f"model.load_adapter({os.fspath(folder)!r})"
        )
    if not file.is_file():
        raise CheckpointNotFoundError(f"{folder} has no config.json: it is not the folder of a transformers model")
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object. Download it again")
    check_trust(content, folder, options.trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except (StrictDataclassError, TypeError) as error:
        raise CheckpointError(f"{file} does not describe a model: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedError(f"transformers cannot read {file}: {error}") from error


def _resolve_dtype(dtype: str | torch.dtype, config: PreTrainedConfig, index: CheckpointIndex | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype.removeprefix("torch."))
    if config.dtype is not None:
        return config.dtype
    stored = (TORCH_DTYPES[tensor.dtype] for tensor in (index or {}).values())
    return next((candidate for candidate in stored if candidate.is_floating_point), torch.get_default_dtype())
