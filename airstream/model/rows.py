"""An embedding table that stays on disk. Looking rows up reads just those rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows it by

from airstream.errors import UnsupportedError
from airstream.model.absent import blank_copy
from airstream.units import MIB

FetchRows = Callable[[Sequence[int]], torch.Tensor]
"""Row numbers, ascending and different -> a tensor of those rows on the device that computes."""

FetchTable = Callable[[], torch.Tensor | None]
"""The whole table, if it is in memory by now."""


COMPARED_BYTES = 8 * MIB
"""Of rows that are read at once to be compared."""


class RowTable(torch.Tensor):
    """Stands for a table of shape (num_rows, width) in an `nn.Embedding`, without its values.

    `F.embedding` works on it, and therefore whatever an embedding module makes of it (scaling, offsets); so does
    picking rows, `table[0]` or `table[ids, :]`. It has shape, dtype and device; any other use raises
    `UnsupportedError`.
    """

    _is_param = True  # what `isinstance(..., nn.Parameter)` looks for
    _rows: FetchRows
    _whole: FetchTable

    @staticmethod
    def __new__(
        cls, rows: FetchRows, whole: FetchTable, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> RowTable:
        table: RowTable = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        table._rows, table._whole = rows, whole
        return table

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's is untyped
        return f"RowTable(shape={tuple(self.shape)}, dtype={self.dtype}, on disk)"

    def __deepcopy__(self, _: Any) -> torch.Tensor:
        return blank_copy(self)

    def _has(self, values: torch.Tensor) -> bool:
        """Whether `values` are those of the table."""
        return values.shape == self.shape and is_same(self._rows, values.to(self.dtype))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            return _embedding(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            return _select(*args)
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # asked for by tools that list parameters
            return args[0]
        if func is torch.ops.aten.copy_.default and isinstance(args[0], RowTable) and args[0]._has(args[1]):
            return args[0]  # adapters bring along the table that they were trained with: it is here already
        raise UnsupportedError(
            f"{func} was called on an embedding table that is left on disk: only looking rows up works on it"
        )


def _select(table: RowTable, index: Any) -> torch.Tensor:
    """`table[index]`, if `index` picks rows by their numbers: `table[0]`, `table[ids]`, `table[0, :4]`."""
    picked, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
    is_number = isinstance(picked, int) and not isinstance(picked, bool)
    if not is_number and not (isinstance(picked, torch.Tensor) and picked.dtype in (torch.int32, torch.int64)):
        raise UnsupportedError(
            f"table[{index!r}] asks for more of an embedding table that is left on disk than rows by their numbers"
        )
    ids = torch.as_tensor(picked, device=table.device)
    rows = _embedding(torch.where(ids < 0, ids + table.shape[0], ids), table)
    place = (*[slice(None)] * ids.dim(), *rest)
    return rows[place] if rest else rows


def is_same(fetch: FetchRows, values: torch.Tensor) -> bool:
    """Whether `values` are all the rows that `fetch` gives. Blocks while they are read, a few at a time."""
    step = max(COMPARED_BYTES // max(values[:1].nbytes, 1), 1)
    blocks = (range(start, min(start + step, len(values))) for start in range(0, len(values), step))
    return all(torch.equal(fetch(block).cpu(), values[block.start : block.stop].cpu()) for block in blocks)


def _embedding(ids: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """`F.embedding(ids, table)`. The other arguments are for training, and `max_norm`, which no language model uses."""
    assert isinstance(weight, RowTable)
    whole = weight._whole()
    if whole is not None:
        return F.embedding(ids, whole)
    different, positions = torch.unique(ids, return_inverse=True)
    numbers = different.tolist()
    if numbers and not 0 <= numbers[0] <= numbers[-1] < weight.shape[0]:
        raise IndexError(f"token ids from {numbers[0]} to {numbers[-1]} are not in the table of {weight.shape[0]} rows")
    return F.embedding(positions, weight._rows(numbers))
