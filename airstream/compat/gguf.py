"""This reads GGUF checkpoints as transformers does: config, tokenizer, which tensor is which weight, what changed it.

transformers has two ways, which this wraps alike: tables of renames and conversions for the newest architectures, and
for all others "tensor processors", numpy code that undoes what llama.cpp did to a weight. Either is run as a
`MappedConversion` is: on row numbers where it only moves rows, else on values.

It refuses to know where bytes lie: `checkpoint.gguf` reads the headers.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from airstream.checkpoint.config_file import check_numbers
from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.gguf_outline import write_outline
from airstream.checkpoint.stored import CheckpointIndex
from airstream.compat.key_conversion import KeyConversion
from airstream.compat.mapped_conversion import MappedConversion
from airstream.compat.quantizer import Quantizer
from airstream.errors import CheckpointError, CheckpointNotFoundError, UnsupportedError
from airstream.reporting.extras import install
from airstream.reporting.units import counted

OUTPUT = "output.weight"
"""The weight of the lm_head. A file without it ties the head to the embeddings."""

TIED_ANYWAY = ("falcon", "bloom")
"""Architectures that transformers ties, whatever the file has."""

GENERAL_TOKENIZER = "TokenizersBackend"
"""What transformers calls the class of tokenizers of models whose type has none of its own."""

DECIDED_BY_FILES = (None, "MistralCommonBackend")
"""Names of classes in the place of which transformers may take another one, by what files there are."""


def gguf_config(index: GgufIndex) -> PreTrainedConfig:
    """The config of the model in `index`, as `AutoConfig.from_pretrained(folder, gguf_file=...)`.

    Raises:
        UnsupportedError: the package gguf is missing, or transformers does not know this architecture.
        CheckpointError: the file does not describe a model.
    """
    _need_gguf()
    try:
        config = _read_config(index)
    except CheckpointError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise UnsupportedError(f"transformers cannot read {index.first}: {_line(error)}") from error
    except Exception as error:  # its reader trusts the metadata, and fails in as many ways as that can be wrong
        raise CheckpointError(f"{index.first} does not describe a model: {_line(error)}") from error
    if len(index.files) > 1 and index.architecture not in TIED_ANYWAY:
        config.tie_word_embeddings = OUTPUT not in index  # transformers has looked into the first file only
    check_numbers(index.first, config.to_dict())
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if not isinstance(layers, int) or not 0 < layers <= len(index):
        raise CheckpointError(
            f"{index.first} claims {counted(layers, 'layer')}, and has {counted(len(index), 'tensor')}: it is not sound"
        )
    return config


def _read_config(index: GgufIndex) -> PreTrainedConfig:
    """What transformers reads of an outline: it looks at a whole file word by word, several times."""
    with tempfile.TemporaryDirectory(prefix="airstream-") as folder:
        outline = Path(folder) / index.first.name
        write_outline(index.first, outline)
        config = AutoConfig.from_pretrained(outline.parent, gguf_file=outline.name)
    config.name_or_path = os.fspath(index.first.parent)
    return config


def gguf_tokenizer(index: GgufIndex, config: PreTrainedConfig) -> Any:
    """The tokenizer in `index`, chat template included, for a model of `config`."""
    _need_gguf()
    try:
        return _load_tokenizer(index, config)
    except Exception as error:  # as above
        raise CheckpointNotFoundError(
            f"{index.first} has no tokenizer that transformers can read: {_line(error)}"
        ) from error


def _load_tokenizer(index: GgufIndex, config: PreTrainedConfig) -> Any:
    """What `AutoTokenizer` makes of the file, which reads the config once more, word by word, to find the class.

    It is the class of the model's type, or of all whose type has none, unless a file beside the checkpoint names one.
    """
    source = {"pretrained_model_name_or_path": index.first.parent, "gguf_file": index.first.name}
    name = TOKENIZER_MAPPING_NAMES.get(config.model_type, GENERAL_TOKENIZER)
    if name in DECIDED_BY_FILES or (index.first.parent / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(**source)
    if name == GENERAL_TOKENIZER:
        return PreTrainedTokenizerFast.from_pretrained(**source)
    return AutoTokenizer.from_pretrained(tokenizer_type=config.model_type, **source)


def gguf_dtype(index: GgufIndex) -> torch.dtype:
    """What `dtype="auto"` is for a GGUF checkpoint in transformers: float32, but for newer architectures in halves."""
    types = {tensor.dtype for tensor in index.values()}
    if index.architecture in _table_of_mappings() and types <= {"F32", "F16", "BF16"}:
        return next((dtype for name, dtype in _HALVES.items() if name in types), torch.float32)
    return torch.float32


_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


def conversion_for(model: PreTrainedModel, index: CheckpointIndex, quantizer: Quantizer | None = None) -> KeyConversion:
    """How the keys of `index` become names of `model`; with `quantizer`, if the checkpoint has one."""
    if not isinstance(index, GgufIndex):
        return MappedConversion(model, quantizer)
    mappings = _table_of_mappings()
    if index.architecture in mappings:
        return _TableConversion(model, mapping=mappings[index.architecture](model.config))
    return _ProcessedConversion(model, index.architecture)


class _TableConversion(MappedConversion):
    """By a table of renames and converters. They work in the dtype that the file has."""

    keeps_views = True

    def source_dtype(self, pattern: str | None, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
        return wanted if pattern is None else stored


class _ProcessedConversion(KeyConversion):
    """By a tensor processor, in float32."""

    keeps_views = True

    def __init__(self, model: PreTrainedModel, architecture: str) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._process = processor(config=_Fields(model.config)).process
        self._pattern = None if processor is TensorProcessor else "processed"
        outline = _Outline(model, model.config)
        try:
            self._names = get_gguf_hf_weights_map(outline, processor(config=_Fields(model.config)))
        except NotImplementedError as error:
            raise UnsupportedError(f"the package gguf does not know {architecture!r}: {_line(error)}") from error
        if architecture == "gpt2":
            self._names.setdefault(OUTPUT, "lm_head.weight")  # where its processor puts it

    def source_dtype(self, pattern: str | None, _: torch.dtype, wanted: torch.dtype) -> torch.dtype:
        return wanted if pattern is None else torch.float32

    def rename(self, key: str) -> tuple[str, str | None]:
        # Merged experts are parameters, not modules, so that their names do not end in ".weight".
        name = self._names.get(key) or self._names.get(key.removesuffix(".weight"), "")
        return name, self._pattern

    def convert(
        self,
        _: str,
        sources: Sequence[tuple[str, str, torch.Tensor]],
        into: torch.Tensor | None = None,  # noqa: ARG002 - numpy makes the result
    ) -> dict[str, torch.Tensor]:
        device = sources[0][2].device
        if device.type not in ("cpu", "meta"):
            try:
                return self._convert([(key, tensor) for key, _, tensor in sources])
            except (TypeError, RuntimeError):  # it wants to be numpy's
                pass
        converted = self._convert([(key, _array(tensor)) for key, _, tensor in sources])
        return {target: _tensor(value, device) for target, value in converted.items()}

    def _convert(self, sources: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        """What the processor makes of weights: arrays of numpy's, or tensors, as it pleases."""
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        for key, weights in sources:
            with np.errstate(all="ignore"):  # row numbers have no logarithms
                result = self._process(weights, key, tensor_key_mapping=self._names, parsed_parameters=parsed)
            if result.name is not None:
                parsed["tensors"][self._names[result.name]] = result.weights
        return parsed["tensors"]


class _Fields(Mapping[str, Any]):
    """A config as the table of its fields that processors look things up in."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self._config, name)
        except AttributeError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._config.to_dict())

    def __len__(self) -> int:
        return len(self._config.to_dict())


class _Outline:
    """As much of a module as the search for names looks at: the models inside it, and none of their layers.

    The search makes a table of all names of all layers for every module that it is shown: minutes, for a large model.
    """

    def __init__(self, module: nn.Module, config: PreTrainedConfig) -> None:
        self._module = weakref.proxy(module)
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()

    def named_children(self) -> Iterator[tuple[str, _Outline]]:
        for name, child in self._module.named_children():
            has_layers = any(isinstance(module, nn.ModuleList) for module in child.modules())
            if has_layers and not isinstance(child, nn.ModuleList):
                yield name, _Outline(child, self.config)


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """`tensor` for numpy; of one on the meta device the shape alone, in no memory."""
    if tensor.device.type == "meta":
        return np.broadcast_to(np.zeros((), np.float32), tuple(tensor.shape))
    return tensor.cpu().numpy()


def _tensor(value: Any, device: torch.device) -> torch.Tensor:
    if device.type == "meta":
        return torch.empty(tuple(value.shape), device="meta", dtype=torch.float32)
    return (value if isinstance(value, torch.Tensor) else torch.from_numpy(value)).to(device)


def _table_of_mappings() -> Mapping[str, Any]:
    """Architecture -> what makes its renames and converters of a config. Older releases of transformers have none."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        return {}
    return GGUF_ARCHS


def _need_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedError(f"GGUF files need the package gguf: {install('gguf', 'gguf')}")


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
