"""What there is to ask of how the tensors of a checkpoint become the weights of a model.

It refuses to know whose names they are, and who converts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from airstream.compat.assembled import Assembled
from airstream.reporting.units import counted


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
