"""This says which files a prepared checkpoint becomes: what the model says of its tensors, put to `plan`.

It knows models. It refuses to know folders, and what a killed run has left.
"""

from __future__ import annotations

from dataclasses import replace

from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.stored import ITEM_BYTES, CheckpointIndex
from airstream.compat.weights import KeyConversion, MappedConversion, natural_order, tied_names
from airstream.errors import ArgumentError, UnsupportedError
from airstream.layout.parts import find_units
from airstream.loading.prepared import Prepared
from airstream.repacking.plan import Member, Order, Shard, parse_layers, plan_shards
from airstream.repacking.way import Way


def check_storable(prepared: Prepared) -> None:
    """Refuse a checkpoint with what safetensors cannot hold.

    Raises:
        UnsupportedError: it is GGUF, or has a tensor of a type that safetensors has no name for.
    """
    index = prepared.index
    if isinstance(index, GgufIndex):
        raise UnsupportedError(
            f"{index.first} is GGUF, which safetensors cannot hold: airstream reads it as it lies, name it as the model"
        )
    unknown = next((tensor for tensor in index.values() if tensor.dtype not in ITEM_BYTES), None)
    if unknown is not None:
        raise UnsupportedError(
            f"tensor {unknown.name!r} is stored as {unknown.dtype}, which safetensors has no name for"
        )


def plan_files(
    prepared: Prepared,
    layers: str | range | tuple[int, int] | None,
    shard_bytes: int,
    way: Way,
) -> tuple[list[Shard], tuple[int, int] | None]:
    """The files that the checkpoint becomes, and the layers that are kept: (first, behind the last), or all.

    Raises:
        ArgumentError: there are no such layers.
    """
    model, index = prepared.model, prepared.index
    stacks = find_units(model)
    if layers is not None and len(stacks) != 1:
        raise ArgumentError(f"layers={layers!r}: {type(model).__name__} has {len(stacks)} stacks of layers, not one")
    chosen = parse_layers(layers, len(stacks[0])) if layers is not None else None
    names = list(model.state_dict())
    members = _members(index, MappedConversion(model), set(names))
    order = Order(names, stacks, tied_names(model))
    shards = plan_shards(members, order, chosen, shard_bytes, way.made_of, way.on_pages)
    return [replace(shard, metadata=way.metadata) for shard in shards], chosen


def _members(index: CheckpointIndex, conversion: KeyConversion, names: set[str]) -> list[Member]:
    renamed = ((key, conversion.rename(key)[0]) for key in natural_order(index))
    return [Member(index[key], name if name in names else None) for key, name in renamed]
