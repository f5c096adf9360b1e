"""This adds up what takes memory, line by line: of the device that computes, and of the host.

It refuses to know why so many weights stay, or wait: `planner` decides that.
"""

from __future__ import annotations

from typing import NamedTuple

from airstream.plan.facts import ModelFacts
from airstream.plan.plan import ACTIVATIONS, KV_CACHE, RESIDENT, Tier
from airstream.plan.request import HOST, Request, Workload
from airstream.reporting.units import MIB

__all__ = ["DEVICE_RUNTIME_BYTES", "Weights", "tiers_of"]

HOST_RUNTIME_BYTES = 46 * MIB
"""What a first forward pass adds to the host process on its own: lazily imported code, thread stacks, kernels.

Up to 32 MiB in float32; in half precision, where kernels are kept (`kernels`), up to 44.
"""

INCLUDED_TENSORS, TENSOR_BYTES = 4_000, 1_300
"""The runtime has room for what the engine knows of so many tensors of a checkpoint; each further one takes this."""

DEVICE_RUNTIME_BYTES = 128 * MIB
"""Matrix-multiplication workspaces, and the rounding of small blocks by the device's allocator."""


class Weights(NamedTuple):
    """The bytes that weights take: in the ring, where they compute, by being allocated there, and where they wait."""

    ring: int
    resident: int
    rounding: int
    hosted: int


def tiers_of(facts: ModelFacts, request: Request, context: int, weights: Weights) -> dict[str, Tier]:
    """What takes the memory of each tier, if sequences have `context` tokens."""
    need = facts.footprint
    workload = request.workload or Workload.generation(
        request.max_batch_size, context, pixel_values=request.max_batch_size * facts.footprint.image_values
    )
    work = {
        "ring": weights.ring,
        RESIDENT: weights.resident,
        "adapters": facts.adapter_bytes,
        KV_CACHE: workload.kv_bytes(need),
        ACTIVATIONS: workload.activation_bytes(need),
        "conversion": facts.conversion_bytes,
    }
    host = {
        "hosted weights": weights.hosted,
        "staging": request.staging_bytes,
        "tokenizer": need.tokenizer_bytes if facts.has_tokenizer else 0,
        "runtime": HOST_RUNTIME_BYTES + TENSOR_BYTES * max(0, facts.num_tensors - INCLUDED_TENSORS),
    }
    if request.driver_bytes:
        host["device driver"] = request.driver_bytes
    decoding = {"decoding": request.decoding_bytes} if request.decoding_bytes else {}
    items = {HOST: work | decoding | host}
    if request.tier != HOST:
        device = {"rounding": weights.rounding, "runtime": DEVICE_RUNTIME_BYTES}
        items = {request.tier: work | decoding | device, HOST: host}
    return {name: Tier(request.budgets[name], request.budget_notes[name], parts) for name, parts in items.items()}
