"""This says which tensors lie in which order in which file of a repacked checkpoint. It reads and writes nothing.

Tensors of one layer lie side by side in the order in which the model lists them, and every layer begins on a page of
its file. safetensors allows no gaps between tensors, so a file ends where the next layer would not begin on a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from airstream.checkpoint.names import SINGLE_FILE
from airstream.checkpoint.safetensors_writer import METADATA, header_bytes
from airstream.checkpoint.stored import ITEM_BYTES, StoredTensor
from airstream.transfer.files import PAGE_BYTES

SHARD_SIZE = "4GiB"
"""What a file is not larger than, unless somebody says so."""


class Member(NamedTuple):
    """A tensor of the checkpoint, and the model's name that it becomes or becomes part of: None if it is not used."""

    tensor: StoredTensor
    name: str | None


@dataclass(frozen=True, slots=True)
class Order:
    """What the model says of its tensors.

    Attributes:
        names: of all its parameters and buffers, in its own order.
        units: its layers, in order; one run of names for each stack of layers.
        ties: name -> the name whose weight it shares.
    """

    names: Sequence[str]
    stacks: Sequence[Sequence[str]]
    ties: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: tensors one behind the other.

    Attributes:
        metadata: what its header says besides.
    """

    file: str
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return sum(tensor.nbytes for tensor in self.tensors)


def header_of(shard: Shard) -> bytes:
    """What precedes the tensors of `shard`."""
    tensors = ((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in shard.tensors)
    return header_bytes(tensors, shard.metadata)


class Run(NamedTuple):
    """Tensors that lie together: those of one layer, or what is outside the layers on one side of them."""

    unit: str | None
    members: list[Member]


def plan_shards(
    members: Iterable[Member],
    order: Order,
    layers: tuple[int, int] | None,
    shard_bytes: int,
    made_of: Callable[[StoredTensor], Sequence[StoredTensor]] = lambda tensor: (tensor,),
    on_pages: bool = True,
) -> list[Shard]:
    """The files of the repacked checkpoint.

    Args:
        members: tensors of the checkpoint; those of one name in the order in which they are to lie.
        layers: the first layer that is kept and the one behind the last; all, if not given. What comes before the
            layers (embeddings) goes with the first layer, what comes behind them (norm, lm_head) with the last one.
        shard_bytes: what a file should not be larger than. A layer is never cut.
        made_of: what is written in the place of a tensor.
        on_pages: every layer begins on a page. Not where tensors are packed, for they are unpacked from a buffer.
    """
    runs = _runs(_distinct(members, order.ties), order)
    if layers is not None:
        runs = _within(runs, order, *layers)
    files: list[list[StoredTensor]] = []
    size = 0
    for run in runs:
        tensors = [made for member in run.members for made in made_of(member.tensor)]
        tensors.sort(key=lambda tensor: -ITEM_BYTES[tensor.dtype])  # keeps every element on a multiple of its size
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if not files or (on_pages and size % PAGE_BYTES) or size + nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1] += tensors
        size += nbytes
    if len(files) == 1:
        return [Shard(SINGLE_FILE, tuple(files[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(files):05}.safetensors", tuple(tensors))
        for number, tensors in enumerate(files, start=1)
    ]


def _runs(members: Sequence[Member], order: Order) -> list[Run]:
    """In the order of the model; what it does not use comes last."""
    places = {name: number for number, name in enumerate(order.names)}
    units = {unit for stack in order.stacks for unit in stack}
    ordered = sorted(members, key=lambda member: places.get(member.name or "", len(places)))
    runs = groupby(ordered, key=lambda member: (member.name is None, _unit_of(member.name, units)))
    return [Run(unit, list(run)) for (_, unit), run in runs]


def _unit_of(name: str | None, units: set[str]) -> str | None:
    parts = (name or "").split(".")
    return next((unit for end in range(1, len(parts)) if (unit := ".".join(parts[:end])) in units), None)


def _distinct(members: Iterable[Member], ties: Mapping[str, str]) -> list[Member]:
    """Without tied weights that lie in the same place of the same file as what they are tied to."""
    kept: dict[object, Member] = {}
    for member in sorted(members, key=lambda member: member.name in ties):
        tensor, name = member
        kept.setdefault((tensor.file, tensor.offset, tensor.nbytes, ties.get(name or "", name or tensor.name)), member)
    return list(kept.values())


def _within(runs: Sequence[Run], order: Order, first: int, end: int) -> list[Run]:
    """The runs of some layers, and what is outside on the side that they reach."""
    (stack,) = order.stacks
    wanted = set(stack[first:end])
    at = [number for number, run in enumerate(runs) if run.unit is not None]
    kept = []
    for number, (unit, members) in enumerate(runs):
        is_last = end == len(stack)
        if unit is not None:
            members = members if unit in wanted else []
        elif members[0].name is None:
            members = []
        elif number < at[0] and first > 0:  # what the lm_head is tied to goes with the lm_head too
            members = [member for member in members if is_last and member.name in set(order.ties.values())]
        elif number > at[-1] and not is_last:
            members = []
        kept.append(Run(unit, members))
    return [run for run in kept if run.members]
