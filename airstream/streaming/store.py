"""Tensors that stay in memory from pass to pass, and what has to come for each layer batch. Survives a change of plan.

Knows which groups of tensors are in which memory. Refuses to know why: that is in the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from airstream.layout.slab import pack, stored_specs
from airstream.layout.tensors import TensorSpec
from airstream.plan.facts import BatchFacts, ModelFacts
from airstream.plan.groups import HOST_PACKING
from airstream.plan.plan import Batch, Plan
from airstream.streaming.fill import Fill, Kept, Ready
from airstream.transfer.base import Backend

Names = tuple[str, ...]


class Store:
    """Memory of resident tensors, by the names of the tensors that share it."""

    def __init__(self, specs: Mapping[str, TensorSpec], backend: Backend) -> None:
        self._specs = specs
        self._backend = backend
        self._kept: dict[Names, Kept] = {}
        self._ready: dict[Names, Ready] = {}

    def fills(self, plan: Plan, facts: ModelFacts) -> list[Fill]:
        """What has to come for every batch of `plan`, and behind them for every resident table.

        Memory of what does not stay in `plan` is given back first, memory of what stays is allocated, not yet read.
        What nothing uses any more must have been unbound.
        """
        batches = [*facts.batchings[plan.layers_per_batch], *([facts.head] if facts.head is not None else [])]
        stays = {name for batch in plan.batches for name in batch.resident} | plan.tables.keys()
        hosted = {name for batch in plan.batches for name in batch.hosted}
        self._kept = {names: kept for names, kept in self._kept.items() if stays.issuperset(names)}
        for names in [names for names in self._ready if not hosted.issuperset(names)]:
            self._ready.pop(names).memory.close()
        fills = [self._fill(batch, groups) for batch, groups in zip(plan.batches, batches, strict=True)]
        nothing = pack((), self._backend.packing)
        return fills + [Fill(nothing, 0, (self._keep((name,)),)) for name in plan.tables]

    def kept(self, name: str) -> Kept | None:
        """Where tensor `name` stays, if it does."""
        return next((kept for names, kept in self._kept.items() if name in names), None)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._kept.clear()
        for ready in self._ready.values():
            ready.memory.close()
        self._ready.clear()

    def _fill(self, batch: Batch, facts: BatchFacts) -> Fill:
        resident, hosted = set(batch.resident), set(batch.hosted)
        groups = [group.names for group in facts.groups]
        kept = [self._keep(names) for names in groups if resident.issuperset(names)]
        ready = [self._make_ready(names) for names in groups if hosted.issuperset(names)]
        rest = self._named(name for names in groups for name in names if name not in resident)
        elsewhere = {spec.name for spec in stored_specs(self._named(hosted))}
        return Fill(pack(rest, self._backend.packing, elsewhere), batch.nbytes, kept, ready)

    def _keep(self, names: Names) -> Kept:
        if names not in self._kept:
            slab = pack(self._named(names), self._backend.packing)
            self._kept[names] = Kept(slab, self._backend.allocate(slab.nbytes, touch=False))
        return self._kept[names]

    def _make_ready(self, names: Names) -> Ready:
        if names not in self._ready:
            slab = pack(stored_specs(self._named(names)), HOST_PACKING)
            self._ready[names] = Ready(slab, self._backend.keep_ready(slab.nbytes))
        return self._ready[names]

    def _named(self, names: Iterable[str]) -> Sequence[TensorSpec]:
        return [self._specs[name] for name in names]
