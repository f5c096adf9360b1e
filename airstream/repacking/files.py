"""This says which files a prepared checkpoint becomes: what the model says of its tensors, put to `plan`.

It knows models. It refuses to know folders, and what a killed run has left.
"""

from __future__ import annotations

from dataclasses import replace

from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.stored import ITEM_BYTES
from airstream.errors import ArgumentError, UnsupportedError
from airstream.layout.parts import find_units
from airstream.layout.shards import Shard, plan_shards
from airstream.layout.shards_of_model import members_of, order_of
from airstream.loading.prepared import Prepared
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
    model = prepared.model
    stacks = find_units(model)
    if layers is not None and len(stacks) != 1:
        raise ArgumentError(f"layers={layers!r}: {type(model).__name__} has {len(stacks)} stacks of layers, not one")
    chosen = parse_layers(layers, len(stacks[0])) if layers is not None else None
    order = order_of(model)
    members = members_of(model, prepared.index, order)
    shards = plan_shards(members, order, chosen, shard_bytes, way.made_of, way.on_pages)
    return [replace(shard, metadata=way.metadata) for shard in shards], chosen


def parse_layers(layers: str | range | tuple[int, int] | None, count: int) -> tuple[int, int] | None:
    """The first of the `count` layers and the one behind the last that `layers` names: `"5:15"`, `":15"`, `"5:"`.

    Raises:
        ArgumentError: it names none, or layers that are not there.
    """
    if layers is None:
        return None
    try:
        if isinstance(layers, range):
            layers = (layers.start, layers.stop) if layers.step == 1 else (-1, -1)
        first, end = layers.split(":") if isinstance(layers, str) else layers
        bounds = (int(first or 0), count if end == "" else int(end))
    except (ValueError, TypeError):
        bounds = (-1, -1)
    if not 0 <= bounds[0] < bounds[1] <= count:
        first = count // 2
        raise ArgumentError(
            f"layers={layers!r}: the model has layers 0 to {count - 1}; {_example(first, count)}, "
            f"{_example(0, first or count)}"
        )
    return bounds


def _example(first: int, end: int) -> str:
    """`'"2:4" would be layers 2 to 3'`."""
    what = f"layers {first} to {end - 1}" if end - first > 1 else f"layer {first} alone"
    return f'"{first}:{end}" would be {what}'
