"""What stands in the place of a weight that is not in memory.

It has the shape, dtype and device that the weight will have while its layer computes, so that whatever looks at a
model between two calls (where are its weights, what must an adapter beside them be like?) gets the answer that is true
when it counts. It has no values: using it raises, instead of computing garbage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from airstream.errors import UnsupportedError


class Absent(torch.Tensor):
    """A weight without its values."""

    _of: str
    _is_stored: Callable[[torch.Tensor], bool]
    _is_param = True  # what `isinstance(..., nn.Parameter)` looks for

    @staticmethod
    def __new__(
        cls, name: str, like: torch.Tensor, device: torch.device, is_stored: Callable[[torch.Tensor], bool]
    ) -> Absent:
        absent: Absent = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)
        absent._of, absent._is_stored = name, is_stored
        return absent

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's is untyped
        return f"Absent({self._of!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, _: Any) -> nn.Parameter:
        return blank_copy(self)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        absent = next(value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Absent))
        if func is torch.ops.aten.detach.default:  # asked for by whatever lists parameters
            return absent
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == torch.device("meta"):
            return torch.empty(absent.shape, dtype=absent.dtype, device="meta")
        if func is torch.ops.aten.copy_.default and args[0] is absent and absent._is_stored(args[1]):
            return absent  # adapters bring along the embeddings that they were trained with: they are here already
        raise UnsupportedError(
            f"{absent._of!r} is not in memory: a streamed model has its weights in place only while it computes, and "
            f"cannot change them ({func}). An adapter that looks at them when it is loaded needs "
            "model.load_adapter(...) or PEFT's low_cpu_mem_usage=True"
        )


def blank_copy(absent: torch.Tensor) -> nn.Parameter:
    """Memory for a copy of a weight that is not there: its values are about to be loaded, and no numbers until then."""
    if not absent.is_floating_point():
        raise UnsupportedError(f"a weight of {absent.dtype} that is not in memory cannot be copied")
    return nn.Parameter(
        torch.full(absent.shape, torch.nan, dtype=absent.dtype, device=absent.device), requires_grad=False
    )
