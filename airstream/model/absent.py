"""An absent tensor stands in the place of a weight that is not in memory.

It has the shape, dtype and device that the weight will have while its layer computes, so that whatever looks at a model
between two calls (where are its weights, what must an adapter beside them be like?) gets the answer that is true when
it counts. Its values are in the checkpoint: a copy of it, or a few of its rows, are read from there. Computing with it,
or changing it, raises, instead of computing garbage.

It knows what it stands for. It refuses to know how values are read, and when the weight is in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from airstream.compat.assembled import said_of_packing
from airstream.model.asking import Freezable
from airstream.model.moving import unmoved
from airstream.model.stored import FetchRows, Stored
from airstream.model.weight_refusals import refuse_absent, refuse_change, refuse_remaking, refuse_storage

ATEN = torch.ops.aten
TO_COPY = torch.ops.aten._to_copy.default
""".to(...), where it changes something."""

IN_PLACE = (
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ifloordiv__",
    "__imod__",
    "__ipow__",
    "__iand__",
    "__ior__",
)


@unmoved
class Absent(Freezable, torch.Tensor):  # type: ignore[misc]  # torch has grad as an attribute
    """A weight without its values, which are `stored`."""

    stored: Stored
    accepted = 0
    """Changes, as weights in memory count them: none is possible."""

    _is_param = True  # what `isinstance(..., nn.Parameter)` looks for: False of a buffer

    @staticmethod
    def __new__(cls, stored: Any, shape: Sequence[int] = (), dtype: Any = None, device: Any = None, **_: Any) -> Absent:
        if not isinstance(stored, Stored):
            refuse_remaking()
        absent: Absent = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        absent.stored = stored
        return absent

    @classmethod
    def in_place_of(cls, tensor: torch.Tensor, stored: Stored, device: torch.device, is_parameter: bool) -> Absent:
        """What stands for `tensor`, whose values are `stored`, and says that it is on `device`."""
        absent = cls(stored, tensor.shape, tensor.dtype, device)
        absent._is_param = is_parameter
        vars(absent).update(said_of_packing(tensor))
        return absent

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's is untyped
        return f"{type(self).__name__}({self.stored.name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @property  # type: ignore[override]  # torch has it as an attribute
    def data(self) -> Absent:
        """The placeholder itself: it has no values apart from it. Setting it to something else is refused."""
        return self

    @data.setter
    def data(self, value: Any) -> None:
        if value is not self:
            refuse_change(self.stored.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._plain()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, it is an ordinary parameter or buffer with its values."""
        return self._plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _plain(self) -> torch.Tensor:
        values = self.stored.read()
        return nn.Parameter(values, self.requires_grad) if self._is_param else values

    def __setitem__(self, _: Any, __: Any) -> NoReturn:
        refuse_change(self.stored.name)

    def numpy(self, *, force: bool = False) -> Any:
        return self.stored.read().numpy(force=force)

    def tolist(self) -> NoReturn:
        _refuse(self.stored, "tolist()", writes=False)

    def untyped_storage(self) -> NoReturn:
        _refuse_storage(self.stored)

    def storage(self) -> NoReturn:
        _refuse_storage(self.stored)

    def data_ptr(self) -> NoReturn:
        _refuse_storage(self.stored)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        absent = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, Absent))
        if func in (ATEN.detach.default, ATEN.alias.default):  # asked for by whatever lists parameters
            return absent
        if func is TO_COPY and kwargs.get("device") == torch.device("meta"):
            return torch.empty(absent.shape, dtype=absent.dtype, device="meta")
        if func in (ATEN.clone.default, TO_COPY) and args[0] is absent:
            values = absent.stored.read()
            return values if func is ATEN.clone.default else func(values, **kwargs)
        if args and args[0] is absent and (numbers := _row_numbers(absent, func, args[1:])) is not None:
            return Excerpt(_pick(absent.stored.rows, numbers), absent.stored.name)
        if func is ATEN.copy_.default and args[0] is absent and (args[1] is absent or absent.stored.has(args[1])):
            return absent  # adapters bring along the embeddings that they were trained with: they are here already
        return _refuse(absent.stored, str(func), writes=func._schema.is_mutable)


def _refuse(stored: Stored, operation: str, *, writes: bool) -> NoReturn:
    """Raise because `operation` needs the values of `stored`, and say what gives them."""
    if stored.is_packed and writes:
        refuse_change(stored.name)
    if stored.is_packed:
        stored.read()
    refuse_absent(stored.name, operation, writes=writes)


def _refuse_storage(stored: Stored) -> NoReturn:
    if stored.is_packed:
        stored.read()
    refuse_storage(stored.name)


class Excerpt(torch.Tensor):
    """Rows that were read for whoever picked them. As a view of the weight would be, but for writing, which raises."""

    _of: str

    @staticmethod
    def __new__(cls, rows: torch.Tensor, of: str) -> Excerpt:
        excerpt: Excerpt = torch.Tensor._make_subclass(cls, rows)
        excerpt._of = of
        return excerpt

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), self.clone())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args and isinstance(args[0], Excerpt) else None
        if target is not None and _writes(func):
            refuse_change(target._of)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if target is None or type(result) is not torch.Tensor or not _share_memory(result, target):
                return result
        return Excerpt(result, target._of)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0


def _writes(func: Any) -> bool:
    """Whether `func`, a method of tensors, changes the tensor it is called on."""
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE


def _row_numbers(absent: Absent, func: Any, rest: Sequence[Any]) -> torch.Tensor | None:
    """The rows that `absent[...]`, as torch takes it apart, asks for, if it asks for rows by their numbers."""
    num_rows = absent.shape[0]
    if func is ATEN.select.int and rest[0] == 0:
        ids = torch.tensor(rest[1], dtype=torch.long, device="cpu")
    elif func is ATEN.slice.Tensor and (not rest or rest[0] == 0):
        ids = torch.arange(num_rows, dtype=torch.long, device="cpu")[slice(*rest[1:])]
    elif func is ATEN.index.Tensor and len(rest[0]) == 1 and rest[0][0].dtype in (torch.int32, torch.int64):
        ids = rest[0][0]
    else:
        return None
    ids = torch.where(ids < 0, ids + num_rows, ids)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_rows:
        raise IndexError(f"rows {ids.tolist()} are not all in {absent.stored.name!r}, which has {num_rows}")
    return ids


def _pick(fetch: FetchRows, numbers: torch.Tensor) -> torch.Tensor:
    different, positions = torch.unique(numbers, return_inverse=True)
    rows = fetch(different.tolist())
    return rows[positions.to(rows.device)]
