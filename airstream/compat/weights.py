"""What a model's weights are called in a checkpoint, how they are converted, and which dtype each must have."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict


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
    """How keys of a checkpoint become names of `model`: renames, and operations that merge, split or reorder.

    Attributes:
        copies: whether a resident model has every tensor in memory of its own, instead of mapped from the file.
    """

    copies = False

    def __init__(
        self, model: PreTrainedModel, mapping: Sequence[WeightRenaming | WeightConverter] | None = None
    ) -> None:
        if mapping is None:
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

    def source_dtype(self, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:  # noqa: ARG002
        """The dtype in which converters get what is `stored` in one dtype and `wanted` in another."""
        return wanted

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
