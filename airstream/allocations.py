"""How much memory a computation holds at most, found by running it on the meta device: shapes, no values, no memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

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

    What asks for a value gets a zero, or False: there are none on the meta device, and a pass that asks whether nothing
    is hidden from its tokens is told that something is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        result = func(*args, **(kwargs or {}))
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

    def alive(self, without: Sequence[torch.Tensor] = ()) -> list[int]:
        """The bytes alive after every operation, memory of the tensors `without` left out."""
        left_out = {memory_of(tensor) for tensor in without}
        changes = [0] * (self._moment + 1)
        for storage, (nbytes, born, died) in self._spans.items():
            if storage not in left_out:
                changes[born] += nbytes
                changes[died if died >= 0 else self._moment] -= nbytes
        return list(accumulate(changes[:-1]))


_NOTHING = {(True, False): 0.0, (False, False): 0, (False, True): False}


def memory_of(tensor: torch.Tensor) -> StorageWeakRef:
    """What tells the memory of one tensor from that of another, on the meta device too."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
