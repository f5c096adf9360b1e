"""This says by which scheme each weight of a compressed-tensors checkpoint is made dense: by the one that targets it.

transformers makes all of them dense by one scheme, in the format that the config names. Where it keeps them packed it
looks at the targets of each scheme, and infers the format that none names: what it loads so is loaded here. It knows
schemes. It refuses to know how numbers are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from functools import partial
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from airstream.compat.plain_formats import says_packing

__all__ = ["choose_schemes", "name_formats"]

OPERATION = "CompressedTensorsDequantize"
"""transformers' name of what makes weights dense."""


def name_formats(inner: HfQuantizer) -> None:
    """Let every scheme of `inner` that names no format, where the config names none either, name the one it implies."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.config import CompressionFormat

    config = inner.compressor.quantization_config
    if config is None or not inner.quantization_config.is_quantization_compressed:
        return  # numbers are not packed yet
    for scheme in config.config_groups.values():
        if scheme.weights is not None and not says_packing(scheme.format or config.format):
            scheme.format = CompressionFormat(infer_module_format(torch.nn.Linear, scheme)).value


def choose_schemes(mapping: Iterable[Any], inner: HfQuantizer) -> None:
    """Let those operations of `mapping`, renames and converters, that make weights dense do so by the scheme of each.

    Experts, which are one tensor in the model, are left to transformers, which finds theirs.
    """
    config = inner.compressor.quantization_config
    if config is None or len(config.config_groups) < 2:
        return
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    for operation in (each for entry in mapping for each in getattr(entry, "operations", ())):
        if type(operation).__name__ == OPERATION and operation.scheme is None:
            operation.convert = partial(_by_its_scheme, operation, schemes)


def _by_its_scheme(operation: Any, schemes: Mapping[str, Any], input_dict: Any, **kwargs: Any) -> dict[str, Any]:
    from compressed_tensors.utils.match import match_targets

    name, _, leaf = kwargs["full_layer_name"].rpartition(".")
    module = kwargs["model"].get_submodule(name)
    targets = match_targets(name, module, schemes) if isinstance(module, torch.nn.Linear) and leaf == "weight" else []
    chosen = copy(operation)
    chosen.scheme = schemes[targets[0]] if targets else None
    made: dict[str, Any] = type(operation).convert(chosen, input_dict, **kwargs)
    return made
