"""This says which kernel computes attention on a device, and what it allocates, for passes on the meta device.

torch asks the device which kernel it is, and of the meta device it believes that scores are materialised, as on none.

It knows one operation of torch. It refuses to know models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

MATH = 0
"""What torch calls the kernel that is none: products, with the scores of every head in between."""


class FusedAttention(TorchFunctionMode):
    """While it is entered, attention of meta tensors allocates what it allocates on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        if not _is_fused(self._device, query, key, value, attn_mask, is_causal, bool(options.get("enable_gqa"))):
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        batch_size, heads, tokens, _ = query.shape
        alive = [torch.empty((batch_size, heads, tokens), dtype=torch.float32, device="meta")]
        if attn_mask is not None:
            alive += _masks(attn_mask, query.dtype, self._device)
        # laid out as (sequences, tokens, heads, width): what comes next is a view of it, not a copy
        result = torch.empty((batch_size, tokens, heads, value.shape[-1]), dtype=query.dtype, device="meta")
        return result.transpose(1, 2)


def _masks(mask: torch.Tensor, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """What becomes of `mask` on its way to the kernel: a boolean one is made into numbers to be added."""
    added = [torch.empty(mask.shape, dtype=dtype, device="meta")] if mask.dtype == torch.bool else []
    if device.type != "cpu":  # rows are lengthened to where kernels can load them
        added.append(torch.empty(mask.shape, dtype=dtype, device="meta"))
    return added


def _is_fused(
    device: torch.device,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    has_groups: bool,
) -> bool:
    """What torch chooses on `device` for tensors like these; for a device that is not here, what cards choose."""
    try:
        small = [torch.empty((1, t.shape[1], 2, t.shape[3]), dtype=t.dtype, device=device) for t in (query, key, value)]
        added = None if mask is None else torch.zeros((1, 1, 2, 2), dtype=mask.dtype, device=device)
        choose: Any = torch._fused_sdp_choice  # torch's stubs have its arguments in another order
        return bool(choose(*small, added, 0.0, is_causal and mask is None, enable_gqa=has_groups) != MATH)
    except (RuntimeError, AssertionError, NotImplementedError):
        return query.shape[-1] == key.shape[-1]
