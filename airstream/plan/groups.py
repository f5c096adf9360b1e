"""This forms groups: the tensors of a layer batch that become resident together, and their order.

Groups are runs of neighbours in the file. They are given away from the two ends of the batch, the smaller end first:
what is left to stream stays one run, and small steps come first, while budgets are small.

It knows how tensors lie in files and in slabs. It refuses to know budgets, and how many groups stay.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from airstream.layout.as_stored import pack_as_stored
from airstream.layout.slab import is_made_in_passes, kept_specs, pack, stored_specs
from airstream.layout.tensors import CACHE_LINE_BYTES, TensorSpec
from airstream.plan.facts import BatchFacts, Group
from airstream.plan.policy import MIN_SHARE, TINY_SHARE
from airstream.reporting.units import round_up
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.packing import Packing


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What is the same for batches that lie in their files alike.

    Attributes:
        groups: each without the names, and the numbers of its tensors.
        slabs, reads: as in `BatchFacts`.
    """

    groups: tuple[tuple[Group, tuple[int, ...]], ...]
    slabs: tuple[int, ...]
    reads: tuple[int, ...]


KnownSizes = dict[Hashable, _Sizes]
"""What is known of batches, so that those that lie in their files alike are laid out once: experts are many tensors."""


def batch_facts(units: Sequence[str], specs: Iterable[TensorSpec], packing: Packing, known: KnownSizes) -> BatchFacts:
    """The sizes of the batch `units` whose tensors are `specs`, for every number of its groups that is resident.

    `known` is for all calls with one packing, and gets what is found out.
    """
    specs = tuple(specs)
    kind = _kind_of(specs)
    sizes = known.get(kind) or _sizes(specs, packing)
    if kind is not None:
        known[kind] = sizes
    groups = tuple(
        replace(group, names=tuple(specs[number].name for number in numbers)) for group, numbers in sizes.groups
    )
    return BatchFacts(tuple(units), groups, sizes.slabs, sizes.reads)


def _sizes(specs: Sequence[TensorSpec], packing: Packing) -> _Sizes:
    numbers = {spec.name: number for number, spec in enumerate(specs)}
    groups = list(_in_order_of_residency(specs))
    slabs, reads = [], []
    for count in range(len(groups) + 1):
        rest = tuple(spec for group in groups[count:] for spec in group)
        slab = pack(rest, packing)
        slabs.append(max(slab.nbytes, 0 if packing.follows_file else _apart(rest, packing)))
        reads.append(slab.read_bytes)
    sized = ((_sized(group, packing), tuple(numbers[spec.name] for spec in group)) for group in groups)
    return _Sizes(tuple(sized), tuple(slabs), tuple(reads))


def _kind_of(specs: Sequence[TensorSpec]) -> Hashable:
    """Equal for batches of which all is the same but names, and how many pages come before them in their file.

    None if they lie in several files, or if converters make some of the tensors: names say which are made together.
    """
    pieces = [piece for spec in specs for piece in spec.pieces]
    if not pieces or any(spec.made_by is not None for spec in specs):
        return None
    file = pieces[0].file
    if any(piece.file is not file and piece.file != file for piece in pieces):
        return None
    start = min(piece.offset for piece in pieces) // PAGE_BYTES * PAGE_BYTES
    places = [(piece.offset - start, piece.nbytes, piece.target, piece.cast) for piece in pieces]
    return tuple((spec.dtype, spec.nbytes, spec.line_offset, len(spec.pieces)) for spec in specs), tuple(places)


def _apart(specs: Sequence[TensorSpec], packing: Packing) -> int:
    """The bytes of a slab in which each tensor lies by itself: some of them may come from host memory."""
    return pack(specs, packing, elsewhere={spec.name for spec in stored_specs(specs)}).nbytes


def _sized(specs: Sequence[TensorSpec], packing: Packing) -> Group:
    """The group of `specs`, without their names."""
    nbytes, host_bytes = pack(specs, packing).nbytes + growth_bytes(specs), pack_as_stored(specs)[0].nbytes
    made = [spec for spec in specs if is_made_in_passes(spec, packing)]
    if not made:
        return Group((), nbytes, host_bytes)
    kept = kept_specs(specs, packing)
    packed_bytes = pack(kept, packing).nbytes + growth_bytes(kept)
    most_between = max(packing.alignment, CACHE_LINE_BYTES) + CACHE_LINE_BYTES  # of two: to a line, and within it
    made_bytes = sum(spec.nbytes + most_between for spec in made)
    return Group((), nbytes, host_bytes, packed_bytes, round_up(made_bytes, PAGE_BYTES))


def growth_bytes(specs: Iterable[TensorSpec]) -> int:
    """What `specs` take besides once they have been computed with, until they are taken out of their modules."""
    return sum(spec.made_by.growth_bytes for spec in specs if spec.made_by is not None)


def _in_order_of_residency(specs: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
    groups = _neighbours(specs)
    while groups:
        first, last = _nbytes(groups[0]), _nbytes(groups[-1])
        yield groups.pop(0 if first < last else -1)


def _neighbours(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """`specs` in groups that lie together. What one converter makes is in one group: all of it, or nothing, is made."""
    enough = MIN_SHARE * _nbytes(specs)
    groups: list[list[TensorSpec]] = []
    for bundle in _bundles(specs):
        beside = bool(groups) and _largest(groups[-1][-1]).pieces[-1].file == _largest(bundle[0]).pieces[0].file
        if beside and (_nbytes(groups[-1]) < enough or _nbytes(bundle) < TINY_SHARE * enough):
            groups[-1] += bundle
        else:
            groups.append(bundle)
    if len(groups) > 1 and _nbytes(groups[-1]) < enough:
        last = groups.pop()
        groups[-1] += last
    return groups


def _bundles(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """`specs` in the order of the file, those that one converter makes together."""
    bundles: dict[object, list[TensorSpec]] = {}
    for spec in specs:
        bundles.setdefault(spec.made_by or spec.name, []).append(spec)
    return sorted(bundles.values(), key=lambda bundle: _place(_largest(bundle[0])))


def _largest(spec: TensorSpec) -> TensorSpec:
    """Of what is read for `spec`."""
    return max(spec.stored, key=lambda stored: stored.nbytes)


def _place(spec: TensorSpec) -> tuple[Path, int]:
    return spec.pieces[0].file, spec.pieces[0].offset


def _nbytes(specs: Sequence[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs)
