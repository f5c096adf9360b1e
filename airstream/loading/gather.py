"""This gathers what the planner has to know of a model from its parts. Sizes are exact: slabs are packed for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from airstream.codecs.products import PANEL_BYTES, RowFormat
from airstream.codecs.rates import product_seconds
from airstream.compat.config_names import EXPERT_COUNTS, ROUTED_COUNTS, first_count, head_count, head_width
from airstream.compat.packed_linear import PackedLinear, packed_formats
from airstream.compat.traits import position_limit, rotary_limit, uses_eager_attention
from airstream.footprint.lm_head import Way, copies_weights, way_of
from airstream.footprint.of_config import footprint
from airstream.layout.parts import Kind, Parts, has_head
from airstream.layout.slab import distinct, pack, stored_specs
from airstream.layout.tensors import TensorSpec
from airstream.loading.build import Built
from airstream.loading.options import EXACT, FAST
from airstream.loading.packed import expanding_seconds, measure_packed
from airstream.plan.facts import Arithmetic, BatchFacts, Group, ModelFacts
from airstream.plan.groups import KnownSizes, batch_facts, growth_bytes
from airstream.plan.policy import AUTO_BATCH_BYTES
from airstream.reporting.units import MIB
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.packing import Packing

KEPT_BY_ALLOCATOR_BYTES = 88 * MIB
"""The C library keeps at most so much freed memory: twice the 32 MiB from which on it maps memory afresh, and some."""

UNPACKING_CODE_BYTES = 32 * MIB
"""Memory of libraries that compute with packed weights, loaded by the first pass, and of what kernels keep. Fitted to
measured peaks of 4-bit bitsandbytes and FP8, which were up to 24 MiB above the plan without it."""


PRODUCTS_BYTES = PANEL_BYTES + 28 * MIB
"""Memory of products with packed weights: rows that are dense for a moment, for the lm_head and in each thread, and the
package of the format, which is asked for its settings. Measured: up to 13 MiB; beside eight busy programs once 3 MiB
more than a plan that had 24 in all for it."""


def gather_facts(
    name: str,
    folder: Path,
    built: Built,
    parts: Parts,
    device: torch.device,
    packing: Packing,
    layers_per_batch: int | Literal["auto"],
) -> ModelFacts:
    """The facts of a model that will compute on `device` with weights that lie as `packing` says."""
    model = built.model
    buffers = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    resident = pack(distinct(parts.specs_of(Kind.RESIDENT)), packing)
    head = batch_facts((parts.head.name,), parts.head.specs, packing, {}) if parts.head else None
    head_bytes = {spec.identity for spec in parts.specs_of(Kind.HEAD)}
    batchings = {count: tuple(_batches(parts, count, packing)) for count in _counts(parts, layers_per_batch)}
    copied_bytes = head.slab_bytes[0] if head and device.type == "cpu" and not _is_packed(model, head) else 0
    way = way_of(model.dtype) if copied_bytes else Way.TOGETHER
    copied_for_each = way is Way.TOGETHER and copied_bytes > 0 and copies_weights(model.dtype)
    everything, moved = list(parts.specs.values()), parts.specs_of(Kind.LAYER, Kind.HEAD)
    packed, expanding = measure_packed(moved), expanding_seconds(built.quantizer, moved)
    return ModelFacts(
        name=name,
        dtype=str(model.dtype).removeprefix("torch."),
        batchings=batchings,
        head=head,
        has_fixed_head=head is None and has_head(model),
        resident_bytes=resident.nbytes + buffers,
        tables={spec.name: Group((spec.name,), pack((spec,), packing).nbytes, None) for spec in _tables(parts)},
        tables_of_head=frozenset(spec.name for spec in _tables(parts) if spec.identity in head_bytes),
        checkpoint_bytes=sum(spec.nbytes for spec in distinct(stored_specs(everything))),
        has_tokenizer=any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")) or any(folder.glob("*.gguf")),
        conversion_bytes=_conversion_bytes(model, parts, everything),
        footprint=footprint(
            model.config,
            model.dtype.itemsize,
            eager_attention=uses_eager_attention(model),
            head_copy_bytes=copied_bytes if way is Way.IN_SLICES else 0,
            head_copy_bytes_each=copied_bytes if copied_for_each else 0,
            cache=built.cache,
            has_head=head is not None or model.can_generate(),
            passes=built.passes,
        ),
        arithmetic=_arithmetic(model, parts),
        stored_bytes=packed.stored_bytes if packed else None,
        decoding_seconds_per_byte=packed.decoding_seconds / packed.stored_bytes if packed else expanding,
        decoding_traffic_per_byte=packed.decoding_traffic / packed.stored_bytes if packed else 0.0,
        kernels=FAST if any(type(module) is PackedLinear for module in model.modules()) else EXACT,
        position_limit=position_limit(model),
        rotary_limit=rotary_limit(model),
    )


def _is_packed(model: PreTrainedModel, head: BatchFacts) -> bool:
    """Whether the lm_head multiplies with packed rows, so that nobody copies it."""
    return f"{head.units[0]}.packed" in packed_formats(model)


def _tables(parts: Parts) -> list[TensorSpec]:
    """The embedding tables, one of those that are tied."""
    return distinct(parts.specs_of(Kind.TABLE))


def _arithmetic(model: PreTrainedModel, parts: Parts) -> Arithmetic:
    in_layers = parts.specs_of(Kind.LAYER)
    head_bytes = sum(spec.nbytes for spec in parts.specs_of(Kind.HEAD))
    expert_bytes, expert_share = sum(spec.nbytes for spec in in_layers if ".experts." in spec.name), 1.0
    text = model.config.get_text_config(decoder=True)
    multiplied = parts.specs_of(Kind.LAYER, Kind.HEAD)
    packed = packed_formats(model)
    if expert_bytes:
        routed = first_count(text, *ROUTED_COUNTS, default=1)
        expert_share = routed / first_count(text, *EXPERT_COUNTS, default=routed)
    return Arithmetic(
        num_layers=len(parts.of(Kind.LAYER)),
        weight_bytes=sum(spec.nbytes for spec in in_layers) + head_bytes,
        head_bytes=head_bytes,
        expert_bytes=expert_bytes,
        expert_share=min(expert_share, 1.0),
        attention_width=head_count(text) * head_width(text),
        num_weights=sum(_numbers(spec, packed.get(spec.name)) for spec in multiplied),
        product_seconds=sum(
            _numbers(spec, packed[spec.name]) * product_seconds(packed[spec.name], spec.shape[0])
            for spec in multiplied
            if spec.name in packed
        ),
    )


def _numbers(spec: TensorSpec, how: RowFormat | None) -> int:
    """The numbers of a tensor, unpacked."""
    return spec.shape[0] * how.columns if how is not None else math.prod(spec.shape)


def needs_staging(parts: Parts, packing: Packing) -> bool:
    """Whether some reads into host memory cannot land in place: for a cast, or for where they lie within a page."""
    packed = (part.specs for part in parts.parts if part.kind is not Kind.TABLE)
    pieces = (piece for specs in packed for piece in pack(distinct(specs), packing).pieces)
    return any(piece.cast is not None or (piece.target - piece.offset) % PAGE_BYTES for piece in pieces)


def _batches(parts: Parts, count: int, packing: Packing) -> Iterator[BatchFacts]:
    known: KnownSizes = {}
    for layers in chain.from_iterable(parts.in_batches(count)):
        specs = (spec for layer in layers for spec in layer.specs)
        yield batch_facts([layer.name for layer in layers], specs, packing, known)


def _counts(parts: Parts, layers_per_batch: int | Literal["auto"]) -> list[int]:
    """The numbers of layers per batch to choose from, best first."""
    longest = max(parts.stacks, default=1)
    if layers_per_batch != "auto":
        return [min(layers_per_batch, longest)]
    sizes = [sum(spec.nbytes for spec in layer.specs) for layer in parts.of(Kind.LAYER)]
    count = math.ceil(AUTO_BATCH_BYTES / max(max(sizes, default=1), 1))
    return list(dict.fromkeys((min(count, longest), 1)))


def _conversion_bytes(model: PreTrainedModel, parts: Parts, specs: Iterable[TensorSpec]) -> int:
    """Outside of slabs: of the conversion that takes most, and of what a layer grows by while it computes.

    C libraries keep freed memory for the next time, and fit what comes next into it only in part: up to 83 MiB beside
    40 MiB in use were measured.
    """
    scratch = max((spec.made_by.scratch_bytes for spec in specs if spec.made_by is not None), default=0)
    scratch += min(2 * scratch, KEPT_BY_ALLOCATOR_BYTES)
    if any(spec.made_by is not None and spec.made_by.scratch_bytes for spec in specs):
        scratch += UNPACKING_CODE_BYTES
    if packed_formats(model):
        scratch += PRODUCTS_BYTES
    return scratch + max((growth_bytes(layer.specs) for layer in parts.of(Kind.LAYER)), default=0)
