"""This says what each tensor of a checkpoint becomes where its weights are quantised, before any of them is read.

It knows names, types and sizes, and what is told of them in `config.json` and in the headers of files. It refuses to
know how a weight is quantised (`compat.quantising`), in which file it lies (`shards`), and how that is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from airstream.checkpoint.safetensors_writer import METADATA
from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.compat.asked_codecs import codec_for
from airstream.compat.asked_formats import AskedFormat
from airstream.compat.mapped_conversion import MappedConversion
from airstream.compat.quantised_modules import choose_modules
from airstream.compat.quantizer import Quantizer
from airstream.compat.weights import DtypePlan
from airstream.errors import UnsupportedError
from airstream.layout.parts import find_units
from airstream.layout.pieces import TORCH_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""safetensors' names of the types."""

WEIGHT = ".weight"


class QuantisedTensors:
    """What the tensors of a checkpoint become by a codec.

    Args:
        model: plain, on the meta device.
        index: of its weights.
        dtype: what a weight is cast to before.
        codec: its name, or what is asked for.
        folder: where the checkpoint lies, for messages.
        quantizer: that of the checkpoint; there must be none.

    Attributes:
        codec: how a weight is quantised.
        dtype: what a weight is cast to before.
        settings: what `config.json` says of it, as `quantization_config`.

    Raises:
        ArgumentError: there is no such codec.
        UnsupportedError: it cannot be had, the checkpoint is quantised already, its model has nothing that can be
            quantised, or the package that the codec takes is not there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        index: CheckpointIndex,
        dtype: torch.dtype,
        codec: str | AskedFormat,
        folder: Path,
        quantizer: Quantizer | None = None,
    ) -> None:
        self.codec = codec_for(codec)
        self.dtype = dtype
        if quantizer is not None:
            raise UnsupportedError(
                f"{folder} is quantised already ({quantizer.method}), so codec={self.codec.name!r} cannot be "
                "made of it: name the checkpoint that it was made of"
            )
        if any(tensor.block is not None for tensor in index.values()):
            raise UnsupportedError(
                f"{folder} is packed already, so codec={self.codec.name!r} cannot be made of it: name the checkpoint "
                "that it was made of, or repack it without a codec first"
            )
        units = [unit for stack in find_units(model) for unit in stack]
        choice = choose_modules(model, units, self.codec, self.dtype)
        self.settings = json.loads(json.dumps(choice.settings))  # as whoever reads the file finds it
        self._sources: dict[str, StoredTensor] = {}
        self._outputs: dict[str, tuple[StoredTensor, ...]] = {}
        self._known: dict[tuple[int, ...], tuple[dict[str, torch.Tensor], str | None]] = {}
        self._attributes: dict[str, str] = {}
        self._casts: dict[str, torch.dtype] = {}
        conversion, dtype_of_name = MappedConversion(model), DtypePlan(model, self.dtype)
        targets = model.state_dict()
        for key, stored in index.items():
            name, pattern = conversion.rename(key)
            module, _, leaf = name.rpartition(".")
            of_experts = module in choice.experts and len(stored.shape) > 1  # else it is a bias
            if of_experts or (module in choice.linear and leaf == "weight"):
                self._add(stored, name, is_whole=pattern is None, of_experts=of_experts)
            elif name in targets:
                self._add_cast(stored, dtype_of_name(name, targets[name].dtype))

    def _add_cast(self, stored: StoredTensor, wanted: torch.dtype) -> None:
        """Note that `stored` is cast, if it is of another dtype: of a quantised checkpoint transformers casts none."""
        own = TORCH_DTYPES[stored.dtype]
        if own != wanted and own.is_floating_point and wanted.is_floating_point:
            nbytes = stored.nbytes // own.itemsize * wanted.itemsize
            self._casts[stored.name] = wanted
            self._outputs[stored.name] = (replace(stored, nbytes=nbytes, dtype=DTYPE_NAMES[wanted]),)
            self._sources[stored.name] = stored

    def _add(self, stored: StoredTensor, name: str, is_whole: bool, of_experts: bool) -> None:
        """Note that `stored` is quantised: it is parameter `name`, or one of several that make it."""
        shape = stored.shape
        if is_whole == of_experts or not stored.name.endswith(WEIGHT) or not self.codec.fits(shape):
            raise UnsupportedError(
                f"tensor {stored.name!r} {list(shape)} cannot be quantised as codec={self.codec.name!r}: "
                f"{'all experts are one tensor in the checkpoint' if is_whole else 'several make one weight'}. "
                "Stream the checkpoint as it is"
            )
        if shape not in self._known:
            weight = torch.empty(shape, dtype=self.dtype, device="meta")
            self._known[shape] = self.codec.outputs(shape, self.dtype), self.codec.attributes(weight)
        made, said = self._known[shape]
        self._outputs[stored.name] = tuple(
            replace(
                stored,
                name=name_of(stored, end),
                nbytes=tensor.nbytes,
                dtype=DTYPE_NAMES[tensor.dtype],
                shape=tuple(tensor.shape),
            )
            for end, tensor in made.items()
        )
        self._sources |= {output.name: stored for output in self._outputs[stored.name]}
        if said is not None:
            self._attributes[name] = said

    def made_of(self, tensor: StoredTensor) -> tuple[StoredTensor, ...]:
        """What stands for `tensor` of the checkpoint: itself, if it stays as it is."""
        return self._outputs.get(tensor.name, (tensor,))

    def source_of(self, tensor: StoredTensor) -> StoredTensor | None:
        """The tensor of the checkpoint that `tensor`, one of those that stand for it, is made of; None if it stays."""
        return self._sources.get(tensor.name)

    def cast_of(self, source: StoredTensor) -> torch.dtype | None:
        """What the numbers of `source` are cast to, if that is all that becomes of them."""
        return self._casts.get(source.name)

    def is_quantised(self, source: StoredTensor) -> bool:
        """Whether other tensors take the place of `source`."""
        return source.name in self._outputs and source.name not in self._casts

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """What the header of every file says, under `__metadata__`."""
        names = {"tensor_names": json.dumps(list(self._attributes))} if self._attributes else {}
        return {**METADATA, **self._attributes, **names}


def name_of(source: StoredTensor, end: str) -> str:
    """The name of what `source`, the weight of a module, becomes and ends with `end`."""
    return f"{source.name.removesuffix('weight')}{end}"
