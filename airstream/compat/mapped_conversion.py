"""This converts the tensors of a checkpoint as transformers would: by its tables of renames and converters.

It knows transformers' tables. It refuses to know files, and where results lie in memory.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from airstream.compat.as_built import AsBuilt
from airstream.compat.assembled import Assembled, assemble, expansion_bytes, growth_bytes
from airstream.compat.expanding import aimed, expand_with_kernels
from airstream.compat.key_conversion import KeyConversion
from airstream.compat.quantizer import Quantizer
from airstream.compat.renames import Renames

__all__ = ["MappedConversion"]


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
        if quantizer is not None and quantizer.kernel:
            expand_with_kernels(mapping)
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
        on_cpu = self._quantizer is not None and self._quantizer.is_on_cpu
        return expansion_bytes(self._model, name, on_cpu), growth_bytes(self._model, name, on_cpu)

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
