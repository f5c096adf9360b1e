"""This quantises a checkpoint, some rows at a time, and says what its `config.json` becomes.

It knows what weights are worth. It refuses to know which tensors take their places (`layout.quantised`), in which file
these lie (`shards`), and how that is written (`write_quantised`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from airstream.checkpoint.config_file import read_config_file
from airstream.checkpoint.stored import StoredTensor
from airstream.compat.asked_formats import AskedFormat
from airstream.compat.quant_codec import SCALES
from airstream.layout.pieces import TORCH_DTYPES
from airstream.layout.quantised import QuantisedTensors, name_of
from airstream.loading.prepared import Prepared


class Quantisation(QuantisedTensors):
    """What a checkpoint becomes by a codec, with the values.

    Raises:
        ArgumentError, UnsupportedError: as the class that it extends.
    """

    def __init__(self, prepared: Prepared, codec: str | AskedFormat) -> None:
        super().__init__(prepared.model, prepared.index, prepared.dtype, codec, prepared.folder, prepared.quantizer)
        self._scales: dict[str, list[torch.Tensor]] = {}

    def of_weight(self, source: StoredTensor) -> Iterator[tuple[str, memoryview]]:
        """What belongs to `source` as a whole, by name; nothing, if it stays as it is. Its rows come next."""
        self._scales.pop(source.name, None)
        if self.is_quantised(source):
            made = self.codec.of_weight(torch.empty(source.shape, dtype=self.dtype, device="meta"))
            yield from self._named(source, made)

    def of_rows(self, source: StoredTensor, raw: torch.Tensor) -> Iterator[tuple[str, memoryview]]:
        """What some rows of `source` become, by the name of the tensor whose next bytes they are.

        Args:
            raw: bytes of the checkpoint: a multiple of `ROW_STEP` rows, the first ones first, or what is left of them.
        """
        cast = self.cast_of(source)
        if cast is None and not self.is_quantised(source):
            yield source.name, raw.numpy().data
            return
        numbers = raw.view(TORCH_DTYPES[source.dtype])
        if cast is not None:
            yield source.name, numbers.to(cast).view(torch.uint8).numpy().data
            return
        rows = numbers.view(-1, *source.shape[1:])
        made = self.codec.of_rows(rows.to(self.dtype))
        if self.codec.of_scales is not None:
            made |= self._of_scales(source, made.pop(SCALES))
        yield from self._named(source, made)

    def _of_scales(self, source: StoredTensor, scales: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What all scales of `source` become, once the last of them are there."""
        assert self.codec.of_scales is not None
        weight = torch.empty(source.shape, dtype=self.dtype, device="meta")
        known = self._scales.setdefault(source.name, [])
        known.append(scales)
        if sum(map(len, known)) < self.codec.num_scales(weight):
            return {}
        return self.codec.of_scales(weight, torch.cat(self._scales.pop(source.name)))

    def _named(self, source: StoredTensor, made: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, memoryview]]:
        for end, tensor in made.items():
            contents = tensor.contiguous().flatten().view(torch.uint8)
            yield name_of(source, end), contents.numpy().data

    def config(self, file: Path) -> dict[str, Any]:
        """The contents of `config.json` of the result; `file` is that of the checkpoint.

        The dtype is said, too: who found it out from the weights would find packed ones.
        """
        values = read_config_file(file)
        if not values.get("dtype") and not values.get("torch_dtype"):
            values["dtype"] = str(self.dtype).removeprefix("torch.")
        return values | {"quantization_config": self.settings}
