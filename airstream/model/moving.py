"""Whether moving or casting a model would change anything: `nn.Module` applies a function to each of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

MOVE = (
    "load it with from_pretrained(..., device=..., dtype=...) instead. A pipeline takes "
    "device=model.device, where inputs belong as well"
)


def changes_nothing(fn: Callable[[torch.Tensor], torch.Tensor], tensors: Iterable[torch.Tensor]) -> bool:
    """Whether `fn`, which a module applies to its tensors, leaves `tensors` as they are. It sees empty ones."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    return all(_leaves(fn, torch.empty(0, dtype=dtype, device=device)) for dtype, device in kinds)


def _leaves(fn: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> bool:
    was_shared = torch.Tensor.is_shared(sample)  # type: ignore[no-untyped-call]
    try:
        is_left = fn(sample) is sample and sample._version == 0
        return is_left and torch.Tensor.is_shared(sample) == was_shared  # type: ignore[no-untyped-call]
    except (AssertionError, NotImplementedError, RuntimeError):  # a device that this torch does not have
        return False
