"""This says what a model's weights are called in a checkpoint, how they are converted, and which dtype each has.

It knows transformers' tables of renames and converters. It refuses to know files, and where results lie in memory.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import partial

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

from airstream.compat.as_built import AsBuilt
from airstream.compat.assembled import Assembled, assemble, expansion_bytes, growth_bytes
from airstream.compat.expanding import aimed
from airstream.compat.quantizers import Quantizer
from airstream.compat.renames import Renames
from airstream.reporting.units import counted


class DtypePlan:
    """The dtype each parameter of `model` must have: the model's, unless it asks for float32 or declares another."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._exceptions = [
            (re.compile(glob.replace("*", ".*")), kept) for glob, kept in model._get_dtype_plan(dtype).items()
        ]

    def __call__(self, name: str, declared: torch.dtype) -> torch.dtype:
        """`declared` is the dtype of the meta parameter `name`."""
        return next((kept for pattern, kept in self._exceptions if pattern.search(name)), declared)


class KeyConversion(ABC):
    """How keys of a checkpoint become names of a model. Nothing is packed, unless a subclass says so.

    Attributes:
        keeps_views: what converters give is kept as it is, a transposed view of its source as well.
    """

    keeps_views = False

    @abstractmethod
    def rename(self, key: str) -> tuple[str, str | None]:
        """The name that checkpoint key `key` belongs to, and the pattern of the converter that makes it, if any."""

    @abstractmethod
    def source_dtype(self, pattern: str | None, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
        """What a checkpoint tensor of `stored` is to be cast to, for a parameter of `wanted`, before any converter."""

    @abstractmethod
    def convert(
        self, name: str, sources: Sequence[tuple[str, str, torch.Tensor]], into: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the converter of `name` on its `sources`: (checkpoint key, pattern, tensor), in natural key order.

        What it makes of them for `name` may be `into`, which has its shape and dtype, if it can be written there.
        """

    def unpacks(self, pattern: str | None) -> bool:  # noqa: ARG002 - asked by those that override it
        """Whether the converter of `pattern` begins with what makes weights of packed tensors."""
        return False

    def makes_object(self, pattern: str) -> bool:  # noqa: ARG002 - asked by those that override it
        """Whether the converter of `pattern` puts packed tensors together to one object: see `assemble`."""
        return False

    def scratch_bytes(self, elements: int) -> int:  # noqa: ARG002 - asked by those that override it
        """What making `elements` of packed tensors takes at least."""
        return 0

    def expansion(self, name: str) -> tuple[int, int]:
        """What computing with the object in the place of parameter `name` takes: bytes for a moment, and for longer."""
        raise TypeError(f"{name} is no object: see `makes_object`")

    def assemble(self, name: str, sources: Sequence[tuple[str, str, torch.Tensor]]) -> Assembled:
        """The object that takes the place of parameter `name`, made of views in `sources`: no values are copied.

        Raises:
            CheckpointError: the tensors do not go together.
        """
        raise TypeError(
            f"{name} is no object, though {counted(len(sources), 'tensor')} came for it: see `makes_object`"
        )


class MappedConversion(KeyConversion):
    """By transformers' renames, and its operations that merge, split, reorder, unpack.

    Args:
        quantizer: of the checkpoint, if it is quantised.
        mapping: the renames and operations, if they are not those of the model's class.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        quantizer: Quantizer | None = None,
        mapping: Sequence[WeightRenaming | WeightConverter] | None = None,
    ) -> None:
        if mapping is None:
            mapping = get_model_conversion_mapping(model) if quantizer is None else quantizer.mapping(model)
        self._model = AsBuilt(model)  # the engine keeps this; it must not keep the model
        self._quantizer = quantizer
        self._targets = model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._renamed = Renames(lambda key: rename_source_key(key, renamings, converters), mapping)
        self._in_model = functools.cache(partial(_in_model, model.base_model_prefix, self._targets))
        self._by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    def rename(self, key: str) -> tuple[str, str | None]:
        name, pattern = self._renamed(key)
        name = self._in_model(name)
        if name not in self._targets and key in self._targets:
            name, pattern = self._in_model(key), None
        return name, pattern

    def unpacks(self, pattern: str | None) -> bool:
        if self._quantizer is None or pattern is None:
            return False
        return self._quantizer.is_load_operation(self._by_pattern[pattern])

    def makes_object(self, pattern: str) -> bool:
        return self._quantizer is not None and self._quantizer.makes_objects and self.unpacks(pattern)

    def source_dtype(self, pattern: str | None, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
        if self._quantizer is not None and (self.unpacks(pattern) or not stored.is_floating_point):
            return stored
        return wanted

    def expansion(self, name: str) -> tuple[int, int]:
        return expansion_bytes(self._model, name), growth_bytes(self._model, name)

    def scratch_bytes(self, elements: int) -> int:
        return self._quantizer.scratch_bytes(elements) if self._quantizer is not None else 0

    def convert(
        self, name: str, sources: Sequence[tuple[str, str, torch.Tensor]], into: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        converter = _fresh(self._by_pattern[sources[0][1]])
        is_one_to_one = len(converter.target_patterns) == 1 and len({pattern for _, pattern, _ in sources}) == len(
            sources
        )
        if into is not None and is_one_to_one and len(converter.operations) == 1:
            converter.operations = [aimed(converter.operations[0], into)]
        for key, pattern, tensor in sources:
            # A callable is what the synchronous loader adds: no thread pool per call.
            converter.add_tensor(name, key, pattern, lambda tensor=tensor: tensor)
        converted = converter.convert(name, model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}

    def assemble(self, name: str, sources: Sequence[tuple[str, str, torch.Tensor]]) -> Assembled:
        return assemble(self._model, name, lambda: self.convert(name, sources)[name])


def _in_model(prefix: str, targets: dict[str, torch.Tensor], name: str) -> str:
    """`name` with the prefix of the base model, or without it, whichever the model has."""
    return str(rename_source_key(name, [], [], prefix, targets)[0])


def _fresh(converter: WeightConverter) -> WeightConverter:
    """`converter` with nothing collected yet. A deep copy, as transformers makes, would copy the quantizer too."""
    fresh = copy(converter)
    fresh.collected_tensors = defaultdict(list)
    fresh.layer_targets = defaultdict(set)
    return fresh


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
