"""What the planner has to know of a model, gathered from its parts. Sizes are exact: slabs are packed to find them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from airstream.backend.base import Packing
from airstream.checkpoint.files import PAGE_BYTES
from airstream.compat import measure_kv_elements, uses_eager_attention
from airstream.footprint import footprint
from airstream.layout import TensorSpec
from airstream.model.units import Parts
from airstream.plan import Batch, ModelFacts
from airstream.slab import distinct, pack
from airstream.units import MIB

AUTO_BATCH_BYTES = 32 * MIB
"""Layers smaller than this move several at a time: below it, the ends of reads cost more than they carry."""


def gather_facts(
    name: str,
    folder: Path,
    model: PreTrainedModel,
    parts: Parts,
    device: torch.device,
    packing: Packing,
    layers_per_batch: int | Literal["auto"],
) -> ModelFacts:
    """The facts of `model`, which will compute on `device` with weights that lie as `packing` says."""
    buffers = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    resident = pack(distinct(parts.resident), packing)
    head_specs = parts.head[1] if parts.head else ()
    head = pack(head_specs, packing) if head_specs else None
    head_pieces = {spec.pieces for spec in head_specs}
    batchings = {count: tuple(_batches(parts, count, packing)) for count in _counts(parts, layers_per_batch)}
    everything = [spec for tensors in parts.units.values() for spec in tensors]
    everything += [*parts.resident, *head_specs, *parts.rows.values()]
    return ModelFacts(
        name=name,
        dtype=str(model.dtype).removeprefix("torch."),
        batchings=batchings,
        head=Batch((parts.head[0],), head.nbytes) if parts.head and head else None,
        head_resident_bytes=head.nbytes if head else 0,
        resident_bytes=resident.nbytes + buffers,
        rows_from_disk={name: spec.nbytes for name, spec in parts.rows.items()},
        rows_of_head=frozenset(name for name, spec in parts.rows.items() if spec.pieces in head_pieces),
        checkpoint_bytes=sum(spec.nbytes for spec in distinct(everything)),
        has_tokenizer=any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")),
        conversion_bytes=max(
            _converted_bytes(tensors) for tensors in (*parts.units.values(), parts.resident, head_specs)
        ),
        footprint=footprint(
            model.config,
            model.dtype.itemsize,
            eager_attention=uses_eager_attention(model),
            head_copy_bytes=head.nbytes if head and device.type == "cpu" and model.dtype == torch.bfloat16 else 0,
            kv_elements=measure_kv_elements(model),
        ),
    )


def group(parts: Parts, count: int) -> Iterator[tuple[str, ...]]:
    """The names of units in batches of `count`. Units of different stacks are never in one batch."""
    names, start = list(parts.units), 0
    for size in parts.stacks:
        stack = names[start : start + size]
        yield from (tuple(stack[first : first + count]) for first in range(0, size, count))
        start += size


def needs_staging(parts: Parts, packing: Packing) -> bool:
    """Whether some reads into host memory cannot land in place: for a cast, or for where they lie within a page."""
    specs = [*parts.units.values(), parts.resident, *([parts.head[1]] if parts.head else [])]
    pieces = (piece for tensors in specs for piece in pack(distinct(tensors), packing).pieces)
    return any(piece.cast is not None or (piece.target - piece.offset) % PAGE_BYTES for piece in pieces)


def _batches(parts: Parts, count: int, packing: Packing) -> Iterator[Batch]:
    for units in group(parts, count):
        slab = pack((spec for unit in units for spec in parts.units[unit]), packing)
        yield Batch(units, slab.nbytes)


def _counts(parts: Parts, layers_per_batch: int | Literal["auto"]) -> list[int]:
    """The numbers of layers per batch to choose from, best first."""
    longest = max(parts.stacks, default=1)
    if layers_per_batch != "auto":
        return [min(layers_per_batch, longest)]
    sizes = [sum(spec.nbytes for spec in tensors) for tensors in parts.units.values()]
    count = math.ceil(AUTO_BATCH_BYTES / max(max(sizes, default=1), 1))
    return list(dict.fromkeys((min(count, longest), 1)))


def _converted_bytes(specs: Sequence[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs if spec.made_by is not None)
