"""`AutoModel.from_pretrained`: from what the user asks for to a running model. Composes the floors below, no more."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from airstream import hardware
from airstream.backend import create_backend, packing_of, staging_bytes
from airstream.checkpoint.hub import resolve
from airstream.checkpoint.imagined import imagine
from airstream.checkpoint.index import CheckpointIndex, has_weights
from airstream.checkpoint.reader import CHUNK_BYTES, NUM_WORKERS, Reader
from airstream.compat import build_on_meta, finish_loading, load_generation_config, model_class
from airstream.config import LoadOptions, MaxMemory, parse_max_memory, refuse_unknown, resolve_device
from airstream.errors import CheckpointError, CheckpointNotFoundError, UnsupportedError
from airstream.layout import TORCH_DTYPES, read_specs
from airstream.model.engine import Engine
from airstream.model.facts import gather_facts, needs_staging
from airstream.model.streamed import StreamedModel, make_streamed
from airstream.model.units import Parts, divide
from airstream.plan import HOST, ModelFacts, Plan, Request, make_plan, with_advice
from airstream.rates.store import facts_for
from airstream.units import format_bytes

AUTO_SHARE = 0.9
"""Of free memory, what a budget that is not given takes. The rest is head-room for everybody else."""

PAGE_CACHE_SHARE = 0.5
"""A checkpoint within this share of the memory left over is read through the page cache: it will stay there."""


class AutoModel:
    """Streams language models of any architecture that transformers knows. See `from_pretrained`."""

    def __init__(self) -> None:
        raise UnsupportedError("AutoModel is not made directly: use AutoModel.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | int | torch.device | None = None,
        max_memory: MaxMemory = None,
        max_context: int | None = None,
        max_batch_size: int = 1,
        layers_per_batch: int | Literal["auto"] = "auto",
        prefetch_batches: int | Literal["auto"] = "auto",
        page_cache: bool | Literal["auto"] = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> Any:
        """A transformers model of the checkpoint's own class whose layers are streamed from disk as they are needed.

        It is a `PreTrainedModel`: `generate()`, `pipeline(...)` and the rest work as ever, with the same results to the
        bit where the arithmetic is the same. It also has `tokenizer`, `plan`, `stats`, `close()`, and is a context
        manager. The checkpoint is read as it lies: nothing is converted, copied, or written beside it.

        Args:
            pretrained_model_name_or_path: a folder with config.json and *.safetensors, or a hub id.
            dtype: of the weights, "auto" for the checkpoint's own.
            device: that computes; the accelerator if there is one, else the CPU.
            max_memory: bytes that the model may cost above what the process used before: weights, ring, KV cache,
                activations. As in accelerate, `{0: "4GiB", "cpu": "8GiB"}`; one size is the budget of the device that
                computes. What is not given is 90 % of the free memory.
            max_context: tokens per sequence that the KV cache is planned for; as many as fit, up to 4096, if not given.
            max_batch_size: sequences that are generated at once.
            layers_per_batch: layers that are moved as one unit.
            prefetch_batches: layer batches that are read ahead; 0 reads each when it is needed.
            page_cache: read through the operating system's page cache; "auto" does if the checkpoint will stay there.
            attn_implementation, revision, token, cache_dir, local_files_only, trust_remote_code: as in transformers.

        Blocks until the first layers are being read; the download, if there is one, included.

        Raises:
            ArgumentError: an argument is unknown, malformed, or contradicts another.
            CheckpointNotFoundError, CheckpointError: there is no such checkpoint, or it is incomplete or corrupt.
            BudgetError: the budgets cannot hold one layer and its work; the message has the smallest that would do.
        """
        known = {name: value for name, value in locals().items() if name in _OPTION_NAMES}
        refuse_unknown(unknown, _OPTION_NAMES)
        prepared = _prepare(pretrained_model_name_or_path, LoadOptions(**known))
        return _assemble(prepared, make_plan(prepared.facts, prepared.request))

    @classmethod
    def plan(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Plan:
        """The plan that `from_pretrained` would follow with the same arguments, and what would make it faster.

        Reads headers; where the weights are not there, the config alone, and plans for what transformers would write.
        """
        refuse_unknown((name for name in options if name not in _OPTION_NAMES), _OPTION_NAMES)
        prepared = _prepare(pretrained_model_name_or_path, LoadOptions(**options), with_weights=False)
        return with_advice(make_plan(prepared.facts, prepared.request), prepared.facts, prepared.request)


_OPTION_NAMES = tuple(option.name for option in fields(LoadOptions))


@dataclass(frozen=True)
class _Prepared:
    """Everything known about a model before the first weight is read."""

    options: LoadOptions
    folder: Path
    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    index: CheckpointIndex
    parts: Parts
    facts: ModelFacts
    request: Request


def _prepare(name: str | os.PathLike[str], options: LoadOptions, with_weights: bool = True) -> _Prepared:
    device = resolve_device(options.device)
    budgets = parse_max_memory(options.max_memory, device)
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
    request = _request(facts, device, budgets, options, staged)
    request = replace(request, hardware=facts_for(folder, device))
    return _Prepared(options, folder, device, dtype, model, index, parts, facts, request)


def _request(
    facts: ModelFacts, device: torch.device, given: dict[str, int], options: LoadOptions, staged: bool
) -> Request:
    """What is asked of the planner: the user's numbers, and measured ones where there are none."""
    available = {HOST: hardware.available_host_bytes()}
    if device.type != "cpu" and str(device.index) not in given:
        available[str(device.index)] = hardware.available_device_bytes(device)
    shares = {name: int(AUTO_SHARE * free) for name, free in available.items()}
    notes = {name: f"{AUTO_SHARE:.0%} of the {format_bytes(free)} available" for name, free in available.items()}
    budgets = shares | given
    left_over = available[HOST] - min(budgets[HOST], available[HOST])
    return Request(
        device=str(device),
        budgets=budgets,
        budget_notes=notes | dict.fromkeys(given, "given"),
        prefetch_batches=None if options.prefetch_batches == "auto" else options.prefetch_batches,
        max_context=options.max_context,
        max_batch_size=options.max_batch_size,
        direct_io=_direct_io(facts, left_over, options),
        staging_bytes=staging_bytes(device, NUM_WORKERS, CHUNK_BYTES) if staged else 0,
    )


def _direct_io(facts: ModelFacts, left_over: int, options: LoadOptions) -> bool:
    if options.page_cache == "auto":
        return facts.checkpoint_bytes > PAGE_CACHE_SHARE * left_over
    return not options.page_cache


def _assemble(prepared: _Prepared, plan: Plan) -> StreamedModel:
    model = prepared.model
    load_generation_config(model, os.fspath(prepared.folder))
    finish_loading(model, prepared.device, prepared.dtype, set(model.state_dict()) - prepared.parts.specs.keys())
    reader = Reader(prepared.index.files, plan.direct_io)
    try:
        backend = create_backend(prepared.device, NUM_WORKERS, CHUNK_BYTES)
    except BaseException:
        reader.close()
        raise
    engine = Engine(
        model,
        prepared.parts,
        prepared.facts,
        prepared.request,
        plan,
        prepared.folder,
        reader,
        backend,
        is_final=prepared.options.max_context is not None,
    )
    make_streamed(model, engine, partial(_load_tokenizer, prepared.folder, prepared.options.trust_remote_code))
    # Where transformers asks what runs where: one device computes, the layers live on disk. It keeps generate() from
    # compiling and pipelines from moving the model.
    model.hf_device_map = {"": prepared.device, **{unit: "disk" for batch in plan.batches for unit in batch.units}}
    weakref.finalize(model, engine.abandon)
    return model


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointNotFoundError(f"{folder} has no tokenizer that transformers can load: {error}") from error


def _load_config(folder: Path, options: LoadOptions) -> PreTrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointNotFoundError(f"{folder} has no config.json: it is not the folder of a transformers model")
    try:
        is_object = isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise CheckpointError(f"{file} is not a JSON object. Download it again")
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
