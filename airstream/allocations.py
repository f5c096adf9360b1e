"""How much memory a computation holds at most, found by running it on the meta device: shapes, no values, no memory."""

from __future__ import annotations

from collections.abc import Sequence
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


def memory_of(tensor: torch.Tensor) -> StorageWeakRef:
    """What tells the memory of one tensor from that of another, on the meta device too."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
