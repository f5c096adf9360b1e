"""This says which tensors may be packed without loss. It refuses to know what they pack to."""

from __future__ import annotations

from airstream.checkpoint.stored import StoredTensor
from airstream.transfer.reader import CHUNK_BYTES

__all__ = ["may_pack"]


def may_pack(tensor: StoredTensor) -> bool:
    """Whether `tensor` may become smaller without loss: what it holds says."""
    has_rows = len(tensor.shape) > 1 and 0 < 2 * tensor.shape[-1] <= CHUNK_BYTES
    return tensor.dtype == "BF16" and tensor.block is None and has_rows
