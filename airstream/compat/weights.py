"""This says which of a model's weights a checkpoint has, under which names, and which dtype each has.

It refuses to know files, and how weights are converted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    dot_natural_key,
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


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would write of `model`, by checkpoint key: tied weights once, merged ones apart again."""
    ignored = set(model._keys_to_ignore_on_save or ())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(tensors, model))


def natural_order(keys: Iterable[str]) -> list[str]:
    """Checkpoint keys in the order in which transformers hands them to converters (layer 2 before layer 10)."""
    key_of = functools.cache(lambda part: dot_natural_key(part)[0])  # most parts are in thousands of keys
    return sorted(keys, key=lambda key: [key_of(part) for part in key.split(".")])


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Name -> the name whose weight it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def may_be_missing(model: PreTrainedModel) -> list[str]:
    """Patterns of names that a checkpoint of this class may lack."""
    return list(model._keys_to_ignore_on_load_missing or ())
