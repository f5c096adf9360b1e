"""The store holds tensors that stay in memory from pass to pass, and says what has to come for each layer batch.

It survives a change of plan. It knows which groups of tensors are in which memory. It refuses to know why: that is in
the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from airstream.layout.as_stored import pack_as_stored
from airstream.layout.slab import pack, stored_specs
from airstream.layout.tensors import TensorSpec
from airstream.plan.facts import BatchFacts, ModelFacts
from airstream.plan.plan import Batch, Plan
from airstream.streaming.fill import Fill, Hosted, Resident
from airstream.transfer.base import Backend

Names = tuple[str, ...]


class Store:
    """Memory of resident tensors, by the names of the tensors that share it."""

    def __init__(self, specs: Mapping[str, TensorSpec], backend: Backend) -> None:
        self._specs = specs
        self._backend = backend
        self._resident: dict[Names, Resident] = {}
        self._hosted: dict[Names, Hosted] = {}

    def change_to(self, plan: Plan, facts: ModelFacts) -> list[Fill]:
        """Hold what stays in `plan`; returns what has to come for every batch, then for every resident table.

        Memory of what does not stay in `plan` is given back first, memory of what stays is allocated, not yet read.
        What nothing uses any more must have been unbound.
        """
        batches = [*facts.batchings[plan.layers_per_batch], *([facts.head] if facts.head is not None else [])]
        stays = {name for batch in plan.batches for name in batch.resident} | plan.tables.keys()
        waits = {name for batch in plan.batches for name in batch.hosted}
        self._resident = {names: memory for names, memory in self._resident.items() if stays.issuperset(names)}
        for names in [names for names in self._hosted if not waits.issuperset(names)]:
            self._hosted.pop(names).memory.close()
        fills = [self._fill(batch, groups) for batch, groups in zip(plan.batches, batches, strict=True)]
        nothing = pack((), self._backend.packing)
        return fills + [Fill(nothing, 0, (self._make_resident((name,)),)) for name in plan.tables]

    def resident(self, name: str) -> Resident | None:
        """Where tensor `name` stays, if it does."""
        return next((memory for names, memory in self._resident.items() if name in names), None)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._resident.clear()
        for hosted in self._hosted.values():
            hosted.memory.close()
        self._hosted.clear()

    def _fill(self, batch: Batch, facts: BatchFacts) -> Fill:
        stays, waits = set(batch.resident), set(batch.hosted)
        groups = [group.names for group in facts.groups]
        resident = [self._make_resident(names) for names in groups if stays.issuperset(names)]
        hosted = [self._make_hosted(names) for names in groups if waits.issuperset(names)]
        rest = self._named(name for names in groups for name in names if name not in stays)
        elsewhere = {spec.name for spec in stored_specs(self._named(waits))}
        return Fill(pack(rest, self._backend.packing, elsewhere), batch.nbytes, resident, hosted)

    def _make_resident(self, names: Names) -> Resident:
        if names not in self._resident:
            slab = pack(self._named(names), self._backend.packing)
            self._resident[names] = Resident(slab, self._backend.allocate(slab.nbytes, touch=False))
        return self._resident[names]

    def _make_hosted(self, names: Names) -> Hosted:
        if names not in self._hosted:
            slab, crossings = pack_as_stored(self._named(names))
            self._hosted[names] = Hosted(slab, crossings, self._backend.allocate_host(slab.nbytes))
        return self._hosted[names]

    def _named(self, names: Iterable[str]) -> Sequence[TensorSpec]:
        return [self._specs[name] for name in names]
