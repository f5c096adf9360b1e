"""A row table is an embedding table that stays on disk. Looking rows up reads just those rows.

It knows which rows are looked up. It refuses to know files and formats: what is `stored` reads itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows it by
from torch import nn

from airstream.errors import ArgumentError, UnsupportedError
from airstream.model.absent import Absent
from airstream.model.hook import Hook
from airstream.model.stored import FetchRows
from airstream.reporting.units import counted
from airstream.system.closing import Closing

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


def _embedding(
    ids: torch.Tensor, weight: torch.Tensor, _padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> torch.Tensor:
    """`F.embedding(ids, table)`. The other arguments are for training, but for `max_norm`, which changes weights."""
    assert isinstance(weight, RowTable)
    if max_norm is not None:
        _refuse_norm(weight.stored.name, max_norm)
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


def watch_tables(model: nn.Module, vocab_size: int, closing: Closing) -> None:
    """Refuse a `max_norm` of any embedding in `model`, now and, until `closing`, when rows are looked up.

    torch cuts the rows that are looked up down to it, in place: that would last where a table stays in memory, reach
    the lm_head that it is tied to, and be lost where rows come from disk.

    Tables of `vocab_size` rows refuse other tokens as well: what torch says names none, and on a device it comes later
    and ends the process's use of it.

    Raises:
        UnsupportedError: one has it already.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            _check_norm(name, module)
            checks = [_check_norm, _check_tokens] if module.num_embeddings == vocab_size else [_check_norm]
            for check in checks:
                handle = module.register_forward_pre_hook(Hook(partial(check, name)), prepend=True)
                closing.callback(handle.remove)


def _check_norm(name: str, module: nn.Module, *_: Any) -> None:
    if module.max_norm is not None:
        _refuse_norm(f"{name}.weight", module.max_norm)


def _check_tokens(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Of the CPU's ids, and of prompts: one token at a time comes out of the model, and looking at it waits for it."""
    ids = args[0] if args else None
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_meta or not ids.numel():
        return
    if ids.device.type != "cpu" and ids.shape[-1] == 1:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    rows = int(module.num_embeddings)  # type: ignore[arg-type]  # it is an embedding's
    if low < 0 or high >= rows:
        raise ArgumentError(
            f"ids of tokens from {low:,} to {high:,} are not all in the vocabulary of {counted(rows, 'token')} "
            f"({name}): use the model's own tokenizer, model.tokenizer"
        )


def _refuse_norm(name: str, max_norm: Any) -> NoReturn:
    raise UnsupportedError(
        f"max_norm={max_norm} would change {name!r} in place whenever its rows are looked up: a streamed model takes "
        "its weights from the checkpoint alone. Set max_norm to None, or cut the rows down to it and save the "
        "checkpoint with transformers, and stream that"
    )
