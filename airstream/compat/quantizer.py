"""This is what there is to ask of the format of a quantised checkpoint. It refuses to know the formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from airstream.checkpoint.stored import StoredTensor
from airstream.compat.packed_sets import check_sets
from airstream.compat.packed_shapes import check_packed_shapes
from airstream.compat.plain_formats import LIBRARY_ITEM_BYTES
from airstream.compat.stated import check_stated

OBJECTS = ("bitsandbytes", "torchao")
"""Formats whose weights are objects made of several tensors of the checkpoint."""

DEQUANTIZED = ("mxfp4", "compressed-tensors")
"""Formats that are always dequantised: what would compute on packed weights rearranges them in place on first use."""

DEQUANTIZED_ON_CPU = ("fp8", "mxfp8")
"""Formats that compute on packed weights on a GPU, and that transformers dequantises where there is none."""

MIN_SCRATCH_ITEM_BYTES: Mapping[str, int] = {"compressed-tensors": LIBRARY_ITEM_BYTES}
"""Bytes per element that dequantising takes at least, where it does something else on the meta device."""

Headers = Sequence[Path] | Mapping[str, str]
"""The files whose headers say of weights what a config does not, or what these say."""


class Quantizer(ABC):
    """How the weights of one quantised checkpoint become those of its model.

    Attributes:
        is_on_cpu: the CPU computes.
        kernel: the name of a kernel of ours that makes them dense, if there is one (`compat.expanding`).
    """

    is_on_cpu: bool = False
    kernel: str | None = None

    def __init__(self, method: str, settings: Mapping[str, Any]) -> None:
        self.method = method
        self.settings = settings

    def check(self, index: Mapping[str, StoredTensor]) -> None:
        """Refuse a checkpoint whose tensors are not packed as its config says, or do not go together.

        Raises:
            CheckpointError: the message names the file, the tensor and, if there is one, the field.
        """
        check_stated(self.settings, self.method, index)
        check_packed_shapes(self.method, index)
        check_sets(self.method, index)

    @abstractmethod
    def settle(self, model: PreTrainedModel, index: Mapping[str, StoredTensor]) -> None:
        """Refuse weights that the modules of `model`, which hold them by now, cannot compute with.

        Raises:
            CheckpointError: some of them do not belong to the model.
            UnsupportedError: a kernel is missing. The messages name the tensor.
        """

    @abstractmethod
    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of everything that is not quantised, if `dtype` is asked for."""

    @abstractmethod
    def preprocess(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device, headers: Headers) -> None:
        """Put the modules that hold quantised weights into `model`, which is on the meta device."""

    @abstractmethod
    def finish(self, model: PreTrainedModel) -> None:
        """What `from_pretrained` does with `model` once its weights are there."""

    @abstractmethod
    def mapping(self, model: PreTrainedModel) -> list[Any]:
        """The renames and converters of checkpoint keys, those of the format included."""

    @abstractmethod
    def is_load_operation(self, converter: Any) -> bool:
        """Whether `converter` begins with what makes weights of the packed tensors of the format."""

    def scratch_bytes(self, elements: int) -> int:
        """What dequantising `elements` takes at least, whatever a run on the meta device says."""
        return elements * MIN_SCRATCH_ITEM_BYTES.get(self.method, 0)

    @property
    def needs_fp8(self) -> bool:
        """Whether its weights stay packed only on devices that multiply FP8."""
        return self.method in DEQUANTIZED_ON_CPU

    @property
    def makes_objects(self) -> bool:
        """Whether that gives objects, rather than dense weights."""
        return self.method in OBJECTS
