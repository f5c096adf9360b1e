"""This says what each tensor of a checkpoint becomes where its weights are quantised, before any of them is read.

It knows names, types and sizes, and what is told of them in `config.json` and in the headers of files. It refuses to
know how a weight is quantised (`compat.quantising`), in which file it lies (`plan`), and how that is written
(`write_quantised`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from airstream.checkpoint.config_file import read_config_file
from airstream.checkpoint.safetensors_writer import METADATA
from airstream.checkpoint.stored import StoredTensor
from airstream.compat.quantised_modules import choose_modules
from airstream.compat.quantising import find_codec
from airstream.compat.weights import DtypePlan, MappedConversion
from airstream.errors import UnsupportedError
from airstream.layout.parts import find_units
from airstream.layout.pieces import TORCH_DTYPES
from airstream.loading.prepared import Prepared

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""safetensors' names of the types."""

WEIGHT = ".weight"


class Quantisation:
    """What a checkpoint becomes by a codec.

    Attributes:
        codec: how a weight is quantised.
        dtype: what a weight is cast to before.
        settings: what `config.json` says of it, as `quantization_config`.

    Raises:
        ArgumentError: there is no such codec.
        UnsupportedError: the checkpoint is quantised already, its model has nothing that can be quantised, or the
            package that the codec takes is not there.
    """

    def __init__(self, prepared: Prepared, codec: str) -> None:
        self.codec = find_codec(codec)
        self.dtype = prepared.dtype
        if prepared.quantizer is not None:
            raise UnsupportedError(
                f"{prepared.folder} is quantised already ({prepared.quantizer.method}), so codec={codec!r} cannot be "
                "made of it: name the checkpoint that it was made of"
            )
        if any(tensor.block is not None for tensor in prepared.index.values()):
            raise UnsupportedError(
                f"{prepared.folder} is packed already, so codec={codec!r} cannot be made of it: name the checkpoint "
                "that it was made of, or repack it without a codec first"
            )
        units = [unit for stack in find_units(prepared.model) for unit in stack]
        choice = choose_modules(prepared.model, units, self.codec, self.dtype)
        self.settings = choice.settings
        self._sources: dict[str, StoredTensor] = {}
        self._outputs: dict[str, tuple[StoredTensor, ...]] = {}
        self._known: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
        self._attributes: dict[str, str] = {}
        self._casts: dict[str, torch.dtype] = {}
        conversion, dtype_of_name = MappedConversion(prepared.model), DtypePlan(prepared.model, self.dtype)
        targets = prepared.model.state_dict()
        for key, stored in prepared.index.items():
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
            self._known[shape] = self.codec.outputs(shape, self.dtype)
        made = self._known[shape]
        self._outputs[stored.name] = tuple(
            replace(
                stored,
                name=_named(stored, end),
                nbytes=tensor.nbytes,
                dtype=DTYPE_NAMES[tensor.dtype],
                shape=tuple(tensor.shape),
            )
            for end, tensor in made.items()
        )
        self._sources |= {output.name: stored for output in self._outputs[stored.name]}
        said = self.codec.attributes(torch.empty(shape, dtype=self.dtype, device="meta"))
        if said is not None:
            self._attributes[name] = said

    def made_of(self, tensor: StoredTensor) -> tuple[StoredTensor, ...]:
        """What stands for `tensor` of the checkpoint: itself, if it stays as it is."""
        return self._outputs.get(tensor.name, (tensor,))

    def source_of(self, tensor: StoredTensor) -> StoredTensor | None:
        """The tensor of the checkpoint that `tensor`, one of those that stand for it, is made of; None if it stays."""
        return self._sources.get(tensor.name)

    def of_weight(self, source: StoredTensor) -> Iterator[tuple[str, memoryview]]:
        """What belongs to `source` as a whole, by name; nothing, if it stays as it is."""
        if source.name in self._outputs and source.name not in self._casts:
            made = self.codec.of_weight(torch.empty(source.shape, dtype=self.dtype, device="meta"))
            yield from self._named(source, made)

    def of_rows(self, source: StoredTensor, raw: torch.Tensor) -> Iterator[tuple[str, memoryview]]:
        """What some rows of `source` become, by the name of the tensor whose next bytes they are.

        Args:
            raw: bytes of the checkpoint: a multiple of `ROW_STEP` rows, the first ones first, or what is left of them.
        """
        if source.name not in self._outputs:
            yield source.name, raw.numpy().data
            return
        numbers = raw.view(TORCH_DTYPES[source.dtype])
        if source.name in self._casts:
            cast = numbers.to(self._casts[source.name])
            yield source.name, cast.view(torch.uint8).numpy().data
            return
        rows = numbers.view(-1, *source.shape[1:])
        yield from self._named(source, self.codec.of_rows(rows.to(self.dtype)))

    def _named(self, source: StoredTensor, made: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, memoryview]]:
        for end, tensor in made.items():
            contents = tensor.contiguous().flatten().view(torch.uint8)
            yield _named(source, end), contents.numpy().data

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """What the header of every file says, under `__metadata__`."""
        names = {"tensor_names": json.dumps(list(self._attributes))} if self._attributes else {}
        return {**METADATA, **self._attributes, **names}

    def config(self, file: Path) -> dict[str, Any]:
        """The contents of `config.json` of the result; `file` is that of the checkpoint.

        The dtype is said, too: who found it out from the weights would find packed ones.
        """
        values = read_config_file(file)
        if not values.get("dtype") and not values.get("torch_dtype"):
            values["dtype"] = str(self.dtype).removeprefix("torch.")
        return values | {"quantization_config": self.settings}


def _named(source: StoredTensor, end: str) -> str:
    """The name of what `source`, the weight of a module, becomes and ends with `end`."""
    return f"{source.name.removesuffix('weight')}{end}"
