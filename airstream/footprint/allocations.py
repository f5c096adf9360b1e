"""This finds how much memory a computation holds at most, by running it on the meta device, without values.

It knows tensors and their memory. It refuses to know what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped, as what it calls below
    """While it is entered, counts the memory of every tensor that an operation returns.

    Attributes:
        peak_bytes: the most that was alive at once. Memory of tensors that were there before does not count.
    """

    def __init__(self, existing: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._existing = {memory_of(tensor) for tensor in existing}
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {storage: nbytes for storage, nbytes in self._alive.items() if not storage.expired()}  # type: ignore[no-untyped-call]
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = memory_of(tensor)
                if storage not in self._existing:
                    self._alive[storage] = tensor.untyped_storage().nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(self._alive.values()))
        return result


class History(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, keeps which memory was alive after every operation since `begin`.

    An operation that has been run on tensors of the same shapes is not run again. What asks for a value gets a zero,
    or False: there are none on the meta device, and a pass that asks whether nothing is hidden from its tokens is told
    that something is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results: dict[Hashable, _Layout] = {}
        self.begin(())

    def begin(self, existing: Sequence[torch.Tensor]) -> None:
        """Forget what has been; memory of `existing` tensors does not count."""
        self._moment = 0
        self._existing = {memory_of(tensor) for tensor in existing}
        self._alive: set[StorageWeakRef] = set()
        self._spans: dict[StorageWeakRef, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _NOTHING[args[0].dtype.is_floating_point, args[0].dtype == torch.bool]
        result = self._run(func, args, kwargs or {})
        for storage in [storage for storage in self._alive if storage.expired()]:  # type: ignore[no-untyped-call]
            self._alive.remove(storage)
            self._spans[storage][2] = self._moment
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = memory_of(tensor)
                if storage not in self._existing and storage not in self._alive:
                    self._alive.add(storage)
                    self._spans[storage] = [tensor.untyped_storage().nbytes(), self._moment, -1]
        self._moment += 1
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` gives. torch finds out shapes in Python, slowly: for the next layer of a kind they are known."""
        asked = _comparable((args, kwargs)) if _makes_one_tensor(func) else None
        if asked is None:
            return func(*args, **kwargs)
        if (layout := self._results.get((func, asked))) is not None:
            return layout.make()
        result = func(*args, **kwargs)
        given = {memory_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        if given and type(result) is torch.Tensor and result.is_meta and memory_of(result) not in given:
            layout = _Layout(result.shape, result.stride(), result.dtype)
            if layout.make().untyped_storage().nbytes() == result.untyped_storage().nbytes():
                self._results[func, asked] = layout
        return result

    def alive(self, without: Sequence[torch.Tensor] = ()) -> list[int]:
        """The bytes alive after every operation, memory of the tensors `without` left out."""
        left_out = {memory_of(tensor) for tensor in without}
        changes = [0] * (self._moment + 1)
        for storage, (nbytes, born, died) in self._spans.items():
            if storage not in left_out:
                changes[born] += nbytes
                changes[died if died >= 0 else self._moment] -= nbytes
        return list(accumulate(changes[:-1]))


class _Layout(NamedTuple):
    """Of a tensor that has memory of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@functools.lru_cache(maxsize=4096)
def _makes_one_tensor(func: Any) -> bool:
    """Whether `func` says that it gives one new tensor, and changes none."""
    schema = func._schema
    returns = schema.returns
    is_one = len(returns) == 1 and str(returns[0].type) == "Tensor" and returns[0].alias_info is None
    return is_one and not schema.is_mutable


def _comparable(value: Any) -> Hashable:
    """What of the arguments of an operation decides the shape of its result; None if they cannot be compared."""
    if isinstance(value, torch.Tensor):
        is_plain = value.is_meta and type(value) in (torch.Tensor, torch.nn.Parameter)
        return (value.shape, value.stride(), value.dtype) if is_plain and not value.is_complex() else None
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, (list, tuple)):
        parts = tuple(_comparable(item) for item in value)
        return None if None in parts else parts
    return (type(value), value) if isinstance(value, _PLAIN) else None


_PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_NOTHING = {(True, False): 0.0, (False, False): 0, (False, True): False}


def memory_of(tensor: torch.Tensor) -> StorageWeakRef:
    """What tells the memory of one tensor from that of another, on the meta device too."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
