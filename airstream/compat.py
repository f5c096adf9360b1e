"""The only module that touches semi-private functions of transformers, so that a new release is one file's work.

What it wraps: building a model without weights, the renames and conversions that transformers 5 applies to checkpoint
keys, the dtype each parameter must have, and what `from_pretrained` does after the last weight has been loaded. The
same calls work from 5.17 on; the test matrix runs the oldest and the newest supported release.
"""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict
from transformers.utils.loading_report import LoadStateDictInfo

from airstream.errors import UnsupportedError

CACHE_KEYWORDS = ("cache", "past_key_values")
"""What forward passes call the KV cache, newest name first."""


def model_class(config: PreTrainedConfig, folder: Path, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The causal language model class of `config`: the checkpoint's own code if it has some and it is trusted.

    Raises:
        UnsupportedError: transformers has no such class for this type of model.
    """
    own = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if own is not None and trust_remote_code:
        return get_class_from_dynamic_module(own, str(folder))
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedError(
            f"{config.model_type!r} is not a causal language model of this transformers version. Upgrade transformers "
            "if the model is new; if it brings its own code, and you trust it, pass trust_remote_code=True"
        ) from None


def build_on_meta(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """A model of `cls` without weights: every parameter and buffer is on the meta device. Changes `config`'s dtype."""
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype, **extra)
    return model.eval().requires_grad_(False)


def load_generation_config(model: PreTrainedModel, folder: str) -> None:
    """Give `model` the checkpoint's generation config, or what its model config says of generation, as transformers."""
    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )


class DtypePlan:
    """The dtype each parameter of `model` must have: the model's, unless it asks for float32 or declares another."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._exceptions = [
            (re.compile(glob.replace("*", ".*")), kept) for glob, kept in model._get_dtype_plan(dtype).items()
        ]

    def __call__(self, name: str, declared: torch.dtype) -> torch.dtype:
        """`declared` is the dtype of the meta parameter `name`."""
        return next((kept for pattern, kept in self._exceptions if pattern.search(name)), declared)


class KeyConversion:
    """How keys of a checkpoint become names of `model`: renames, and operations that merge, split or reorder."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._model = weakref.proxy(model)  # the engine keeps this; it must not keep the model
        self._targets = model.state_dict()
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def rename(self, key: str) -> tuple[str, str | None]:
        """The name that checkpoint key `key` belongs to, and the pattern of the converter that makes it, if any."""
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._targets)
        if name not in self._targets and key in self._targets:
            name, pattern = rename_source_key(key, [], [], prefix, self._targets)
        return name, pattern

    def convert(self, name: str, sources: Sequence[tuple[str, str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Run the converter of `name` on its `sources`: (checkpoint key, pattern, tensor), in natural key order."""
        converter = deepcopy(self._by_pattern[sources[0][1]])
        for key, pattern, tensor in sources:
            # A callable is what the synchronous loader adds: no thread pool per call.
            converter.add_tensor(name, key, pattern, lambda tensor=tensor: tensor)
        converted = converter.convert(name, model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would write of `model`, by checkpoint key: tied weights once, merged ones apart again."""
    ignored = set(model._keys_to_ignore_on_save or ())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(tensors, model))


def natural_order(keys: Iterable[str]) -> list[str]:
    """Checkpoint keys in the order in which transformers hands them to converters (layer 2 before layer 10)."""
    return sorted(keys, key=dot_natural_key)


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Name -> the name whose weight it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def may_be_missing(model: PreTrainedModel) -> list[str]:
    """Patterns of names that a checkpoint of this class may lack."""
    return list(model._keys_to_ignore_on_load_missing or ())


def uses_eager_attention(model: PreTrainedModel) -> bool:
    """Whether attention scores are materialised."""
    return bool(model.config._attn_implementation == "eager")


def cache_keyword(model: PreTrainedModel) -> str:
    """What `model` calls the KV cache among its arguments: "cache" from transformers 5.24 on."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_KEYWORDS if name in accepted), CACHE_KEYWORDS[-1])


def measure_kv_elements(model: PreTrainedModel) -> int | None:
    """Elements that one token adds to the KV cache, found by a forward pass on the meta device; None if that fails.

    Exact where formulas are not: latent attention, shared and sliding layers, heads repeated before they are cached.
    """
    tokens = 2
    cache = DynamicCache(config=model.config)
    try:
        with torch.no_grad():
            ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
            model.base_model(input_ids=ids, use_cache=True, **{cache_keyword(model.base_model): cache})
    except Exception:  # any model's code may look at values, which do not exist here: then formulas have to do
        return None
    tensors = (value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor))
    return -(-sum(tensor.numel() for tensor in tensors) // tokens) or None


def finish_loading(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, missing: set[str]) -> None:
    """Do what `from_pretrained` does last: fill the buffers that no checkpoint has, and parameters it may lack.

    Everything in the state dict but `missing` counts as loaded, though it still is on the meta device.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in missing:
            tensor._is_hf_initialized = True
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )
    config = LoadStateDictConfig(device_map={"": device}, dtype=dtype)
    with _quiet_transformers():
        type(model)._finalize_model_loading(model, config, info)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' load report: what is missing has been judged already, more strictly."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
