"""The store holds tensors that stay in memory from pass to pass, and says what has to come for each layer batch.

It survives a change of plan. It knows which groups of tensors are in which memory. It refuses to know why: that is in
the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain

import torch

from airstream.layout.as_stored import pack_as_stored
from airstream.layout.slab import is_made_in_passes, kept_specs, pack, stored_specs
from airstream.layout.tensors import TensorSpec, view_of
from airstream.plan.facts import BatchFacts, ModelFacts
from airstream.plan.placing import as_packed
from airstream.plan.plan import Batch, Plan
from airstream.plan.sharing import sharing
from airstream.plan.spread import in_order, resident_order
from airstream.streaming.fill import Fill, Hosted, Resident
from airstream.transfer.base import Backend

Names = tuple[str, ...]


class Store:
    """Memory of tensors that stay, by the names of those of a group.

    On an accelerator several groups share an allocation; if others come to share it, or fewer, all of them are read
    again.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], backend: Backend) -> None:
        raw = (each for spec in specs.values() if spec.made_by is not None for each in spec.stored)
        kept = kept_specs(specs.values(), backend.packing)
        self._specs = {**{each.name: each for each in (*raw, *kept)}, **specs}
        self._backend = backend
        self._resident: dict[Names, Resident] = {}
        self._shared: set[tuple[Names, ...]] = set()
        self._hosted: dict[Names, Hosted] = {}

    def change_to(self, plan: Plan, facts: ModelFacts) -> list[Fill]:
        """Hold what stays in `plan`; returns what has to come for every batch, then for every resident table.

        Memory of what does not stay in `plan` is given back first, memory of what stays is allocated, not yet read.
        What nothing uses any more must have been unbound.
        """
        batches = [*facts.batchings[plan.layers_per_batch], *([facts.head] if facts.head is not None else [])]
        stays = {name for batch in plan.batches for name in batch.resident} | plan.tables.keys()
        packed = {name for batch in plan.batches for name in batch.packed}
        waits = {name for batch in plan.batches for name in batch.hosted}
        shared = list(self._sharing(facts.batchings[plan.layers_per_batch], facts.head, stays, packed))
        self._shared &= set(shared)
        kept = {*chain.from_iterable(self._shared), *((name,) for name in plan.tables)}
        self._resident = {names: memory for names, memory in self._resident.items() if names in kept}
        for names in [names for names in self._hosted if not waits.issuperset(names)]:
            self._hosted.pop(names).memory.close()
        for together in shared:
            if together not in self._shared:
                self._allocate(together)
                self._shared.add(together)
        fills = [self._fill(batch, groups) for batch, groups in zip(plan.batches, batches, strict=True)]
        nothing = pack((), self._backend.packing)
        for name in plan.tables:
            if (name,) not in self._resident:
                self._allocate(((name,),))
        return fills + [Fill(nothing, 0, (self._resident[(name,)],)) for name in plan.tables]

    def resident(self, name: str) -> Resident | None:
        """Where tensor `name` stays, if it does."""
        return next((memory for names, memory in self._resident.items() if name in names), None)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._resident.clear()
        self._shared.clear()
        for hosted in self._hosted.values():
            hosted.memory.close()
        self._hosted.clear()

    def _fill(self, batch: Batch, facts: BatchFacts) -> Fill:
        stays, packed, waits = set(batch.resident), set(batch.packed), set(batch.hosted)
        groups = [group.names for group in facts.groups]
        resident = [self._resident[names] for names in groups if stays.issuperset(names)]
        sources = [self._resident[self._kept(names)] for names in groups if packed.issuperset(names)]
        hosted = [self._make_hosted(names) for names in groups if waits.issuperset(names)]
        rest = self._named(name for names in groups for name in names if name not in stays and name not in packed)
        elsewhere = {spec.name for spec in stored_specs(self._named(waits))}
        made = [spec for spec in self._named(batch.packed) if is_made_in_passes(spec, self._backend.packing)]
        beside = {spec.name for spec in kept_specs(made, self._backend.packing)}
        slab = pack([*rest, *made], self._backend.packing, elsewhere, beside)  # the rest as if it were all: as planned
        assert slab.nbytes <= batch.nbytes, "what follows in the ring would be written over"
        return Fill(slab, batch.nbytes, resident + sources, hosted, _tensors_in(sources, beside))

    def _kept(self, names: Names) -> Names:
        """What stays of a group that stays packed."""
        return tuple(spec.name for spec in kept_specs(self._named(names), self._backend.packing))

    def _sharing(
        self, layers: Sequence[BatchFacts], head: BatchFacts | None, stays: set[str], packed: set[str]
    ) -> Iterator[tuple[Names, ...]]:
        """The groups of each allocation. In memory of the host, whose pages are small, each has one of its own."""
        for groups in (in_order(layers, resident_order(layers)), head.groups if head is not None else ()):
            staying = [group for group in groups if stays.issuperset(group.names)]
            kept = (as_packed(group) for group in groups if packed.issuperset(group.names))
            staying += [replace(group, names=self._kept(group.names)) for group in kept]
            alone = self._backend.packing.follows_file
            yield from (
                tuple(group.names for group in together)
                for together in (((group,) for group in staying) if alone else sharing(staying))
            )

    def _allocate(self, together: Sequence[Names]) -> None:
        """Memory for groups that share it."""
        slabs = [pack(self._named(names), self._backend.packing) for names in together]
        memory = self._backend.allocate(sum(slab.nbytes for slab in slabs), touch=False)
        ends = accumulate(slab.nbytes for slab in slabs)
        for names, slab, end in zip(together, slabs, ends, strict=True):
            self._resident[names] = Resident(slab, memory[end - slab.nbytes : end])

    def _make_hosted(self, names: Names) -> Hosted:
        if names not in self._hosted:
            slab, crossings = pack_as_stored(self._named(names))
            self._hosted[names] = Hosted(slab, crossings, self._backend.allocate_host(slab.nbytes))
        return self._hosted[names]

    def _named(self, names: Iterable[str]) -> Sequence[TensorSpec]:
        return [self._specs[name] for name in names]


def _tensors_in(sources: Iterable[Resident], names: Collection[str]) -> Mapping[str, torch.Tensor]:
    """The tensors `names`, which stay as they are, by name."""
    return {
        spec.name: view_of(each.memory, each.slab.offsets[spec.name], spec)
        for each in sources
        for spec in each.slab.specs
        if spec.name in names
    }
