"""This holds the shapes of tensors that belong to one packed weight against each other.

Whoever computes with them finds a wrong one in the middle of a pass, and does not name it. It knows which tensors of
which format have how many dimensions. What their values are, and what a config says of them, it refuses to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from airstream.checkpoint.stored import StoredTensor
from airstream.errors import CheckpointError

__all__ = ["check_packed_shapes"]

Index = Mapping[str, StoredTensor]
Fault = tuple[StoredTensor, str]
"""A tensor, and the shape that it should have."""

VECTORS: Mapping[str, int | None] = {
    ".weight.absmax": None,
    ".weight.nested_absmax": None,
    ".weight.quant_map": 16,
    ".weight.nested_quant_map": 256,
    ".SCB": None,
}
"""Of bitsandbytes, by the ends of their names: how many numbers each has, where that is the same for all weights."""

PACKED_AND_SCALE: Mapping[str, tuple[str, str]] = {
    "compressed-tensors": ("weight_packed", "weight_scale"),
    "torchao": ("_weight_qdata", "_weight_scale"),
}
"""By format: what the names of packed numbers end with, and those of their scales."""


def check_packed_shapes(method: str, index: Index) -> None:
    """Refuse tensors of a checkpoint quantised by `method` whose shapes do not go together.

    Raises:
        CheckpointError: the message names the file and the tensor.
    """
    for stored, wanted in CHECKS.get(method, _nothing)(index):
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name!r}, of a packed weight, has shape {list(stored.shape)} and should "
            f"have {wanted}: it is damaged. Download the checkpoint again"
        )


def _nothing(_: Index) -> Iterator[Fault]:
    return iter(())


def _bitsandbytes(index: Index) -> Iterator[Fault]:
    for name, stored in index.items():
        end = next((end for end in VECTORS if name.endswith(end)), None)
        if end is not None and (len(stored.shape) != 1 or VECTORS[end] not in (None, stored.shape[0])):
            yield stored, str([VECTORS[end]]) if VECTORS[end] else "one dimension"


def _scaled(packed_end: str, scale_end: str) -> Callable[[Index], Iterator[Fault]]:
    def faults(index: Index) -> Iterator[Fault]:
        for name, packed in index.items():
            scale = index.get(name.removesuffix(packed_end) + scale_end) if name.endswith(packed_end) else None
            if scale is not None and len(scale.shape) > len(packed.shape):
                yield scale, f"no more dimensions than {packed.name!r} {list(packed.shape)}"

    return faults


CHECKS: Mapping[str, Callable[[Index], Iterator[Fault]]] = {
    "bitsandbytes": _bitsandbytes,
    **{method: _scaled(*ends) for method, ends in PACKED_AND_SCALE.items()},
}
"""By format. What has a parameter of the model to be compared with, as the scales of fp8, is not here."""
