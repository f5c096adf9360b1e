"""An embedding table that stays on disk. Looking rows up reads just those rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows it by

from airstream.model.absent import Absent
from airstream.model.stored import FetchRows
from airstream.units import counted

FetchTable = Callable[[], torch.Tensor | None]
"""The whole table, if it is in memory by now."""


class RowTable(Absent):
    """Stands for a table of shape (num_rows, width) in an `nn.Embedding`, without its values.

    `F.embedding` works on it, and therefore whatever an embedding module makes of it (scaling, offsets).
    """

    _rows: FetchRows
    _whole: FetchTable

    @staticmethod
    def __new__(
        cls,
        stored: Any,
        shape: Sequence[int] = (),
        dtype: Any = None,
        device: Any = None,
        rows: Any = None,
        whole: Any = None,
        **_: Any,
    ) -> RowTable:
        table = Absent.__new__(cls, stored, shape, dtype, device)
        assert isinstance(table, RowTable)
        table._rows, table._whole = rows, whole
        return table

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            return _embedding(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _embedding(ids: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """`F.embedding(ids, table)`. The other arguments are for training, and `max_norm`, which no language model uses."""
    assert isinstance(weight, RowTable)
    whole = weight._whole()
    if whole is not None:
        return F.embedding(ids, whole)
    different, positions = torch.unique(ids, return_inverse=True)
    numbers = different.tolist()
    if numbers and not 0 <= numbers[0] <= numbers[-1] < weight.shape[0]:
        raise IndexError(
            f"token ids from {numbers[0]} to {numbers[-1]} are not in the table of {counted(weight.shape[0], 'row')}"
        )
    return F.embedding(positions, weight._rows(numbers))
