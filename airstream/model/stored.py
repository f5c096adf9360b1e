"""A stored weight is one as the checkpoint has it.

It knows what can be asked of one. It refuses to know how the answer is found, and whether it is in memory anyway.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

FetchRows = Callable[[Sequence[int]], torch.Tensor]
"""Row numbers, ascending and different -> a tensor of those rows on the device that computes."""


class Stored(ABC):
    """The checkpoint's values of a weight. Names that are tied share one.

    Attributes:
        is_packed: it has no values but through its module, so that a copy cannot be read.
        is_frozen: somebody has said that it needs no gradient, which torch looks at when it computes.
    """

    name: str
    is_packed: bool = False
    is_frozen = False

    @abstractmethod
    def read(self) -> torch.Tensor:
        """All of it, in memory of its own. Blocks for the reads.

        Raises:
            BudgetError: there is not so much memory.
            UnsupportedError: it is packed, and has no values but through its module.
        """

    @abstractmethod
    def rows(self, numbers: Sequence[int]) -> torch.Tensor:
        """Rows by their numbers, ascending and different; of a weight whose rows lie apart, all of it is read."""

    @abstractmethod
    def has(self, values: torch.Tensor) -> bool:
        """Whether `values` are these. Blocks while they are compared."""
