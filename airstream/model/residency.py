"""Residency has a unit's weights in place while it runs: a lease of its batch, and its tensors bound to that memory.

Tensors that stay in memory are bound once, when they have been loaded. Those that are streamed are bound from before
the unit runs until it has run. It refuses to know who calls a unit, and when: `unit_hooks` does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain

from airstream.errors import UnsupportedError
from airstream.layout.tensors import TensorSpec
from airstream.model.binding import Binder, Binding, Views
from airstream.model.weight_refusals import refuse_late_change
from airstream.streaming.fill import Fill, Resident
from airstream.streaming.lease import Lease
from airstream.streaming.streamer import Streamer

MAX_VIEWS_PER_BATCH = 16
"""Places in the ring for which a batch's views are made ahead."""


@dataclass(slots=True, eq=False)
class Batch:
    """Units that are read together.

    Attributes:
        resident: the places of the tensors that stay, bound once `is_settled`.
    """

    number: int
    fill: Fill
    resident: list[tuple[Resident, Binding]]
    units: list[Unit] = field(default_factory=list)
    is_settled: bool = False

    @property
    def needs_nothing(self) -> bool:
        """Whether all that it ever needs is in place."""
        return self.is_settled and not self.fill.slab.nbytes

    def check_residents(self) -> None:
        """Raise UnsupportedError if somebody has changed a weight that stays."""
        for _, binding in self.resident:
            binding.check()


@dataclass(slots=True, eq=False)
class Unit:
    """A module that runs with all its weights in place, or not at all: a layer, say. It is not kept alive by this.

    Attributes:
        position: in its batch.
        streamed: the places of its tensors that are streamed.
    """

    name: str
    batch: Batch
    position: int
    streamed: Binding

    @property
    def is_first(self) -> bool:
        """Whether its batch begins with it."""
        return self.position == 0

    @property
    def is_last(self) -> bool:
        """Whether its batch ends with it."""
        return self.position == len(self.batch.units) - 1


class Residency:
    """Brings the weights of one unit at a time into place. Only the thread that has the turn may use it.

    Args:
        batches: the names of the units in each batch.
        fills: what has to come for each batch, and how it lies in memory.

    Attributes:
        running: the unit whose weights are in place.
    """

    def __init__(
        self, binder: Binder, batches: Sequence[Sequence[str]], fills: Sequence[Fill], streamer: Streamer
    ) -> None:
        self._streamer = streamer
        self._convert = binder.convert
        self._views: dict[tuple[int, int], list[Views]] = {}
        self._lease: Lease | None = None
        self._bound: list[Views] = []
        self.running: Unit | None = None
        self._batches: list[Batch] = []
        for number, (names, fill) in enumerate(zip(batches, fills, strict=False)):  # tables have no units
            resident = [(it, Binding(binder, _inside(names, it.slab.specs))) for it in fill.resident]
            self._batches.append(batch := Batch(number, fill, resident))
            for position, name in enumerate(names):
                binding = Binding(binder, _inside((name,), fill.slab.specs))
                batch.units.append(Unit(name, batch, position, binding))

    @property
    def units(self) -> list[Unit]:
        """All of them, as they lie in the batches."""
        return [unit for batch in self._batches for unit in batch.units]

    def bring_in(self, unit: Unit) -> None:
        """Have the weights of `unit` in place. Blocks until they are there.

        Raises:
            UnsupportedError: those of another one are in place.
        """
        if self.running is not None:
            raise UnsupportedError(
                f"{unit.name} was called while {self.running.name} computes, by one of its hooks: a streamed model has "
                "the weights of one of them in place. Note what the hook sees, and call the model when the pass is over"
            )
        self._streamer.check_open()
        if not unit.batch.needs_nothing:
            self._hold(unit.batch)
            if unit.batch.fill.slab.nbytes:
                unit.streamed.bind(self._bound[unit.position])
        self.running = unit

    def let_go(self) -> None:
        """Unbind whatever is streamed and bound, and give back its batch. Idempotent, also after an interrupt."""
        self.running = None
        if self._lease is None:
            return
        for unit in self._batches[self._lease.region.batch].units:
            unit.streamed.unbind()
        self._lease.end()
        self._lease = None

    def recover(self) -> None:
        """Forget what a turn that was interrupted may have left."""
        self.let_go()
        self._streamer.recover()

    def check(self) -> None:
        """Raise UnsupportedError if somebody has changed a weight, of any unit."""
        for batch in self._batches:
            batch.check_residents()
            for unit in batch.units:
                unit.streamed.check()

    def check_lent(self) -> None:
        """Raise UnsupportedError if somebody has written to memory that was lent to a unit, and holds others by now."""
        for (number, _), batch in self._views.items():
            for position, views in enumerate(batch):
                for loan in views.loans:
                    if loan.was_changed:
                        self._forget_ring()
                        unit = self._batches[number].units[position]
                        unit.streamed.check()  # it knows the weight if that was in place
                        refuse_late_change(unit.name)

    def close(self) -> None:
        """Unbind everything and forget all views of the ring. Idempotent."""
        self.let_go()
        self._views.clear()
        self._bound = []
        for batch in self._batches:
            for _, binding in batch.resident:
                binding.unbind()
            batch.units.clear()  # which know it: in a circle, memory would wait for the garbage collector
        self._batches.clear()

    def _hold(self, batch: Batch) -> None:
        if self._lease is not None and self._lease.region.batch == batch.number:
            return
        self.let_go()
        self._lease = self._streamer.lease(batch.number)
        region, slab = self._lease.region, batch.fill.slab
        if region.fresh or not batch.is_settled:
            region.is_being_changed = True  # an interrupt leaves what can only be read again
            if not batch.is_settled:
                self._settle(batch)
            if region.fresh:
                self._convert.run(slab, region.memory, batch.fill.kept)
            region.fresh = region.is_being_changed = False
        key = (batch.number, region.offset)
        if key not in self._views:
            if len(self._views) > MAX_VIEWS_PER_BATCH * len(self._batches):
                self._views.clear()  # places in the ring repeat; only a restless order of layers gets here
            self._views[key] = [unit.streamed.views(region.memory, slab.offsets, is_lent=True) for unit in batch.units]
        self._bound = self._views[key]

    def _forget_ring(self) -> None:
        """Have everything read anew."""
        self.let_go()
        self._streamer.recover(is_in_doubt=True)
        for views in chain.from_iterable(self._views.values()):
            for loan in views.loans:
                loan.renew()

    def _settle(self, batch: Batch) -> None:
        """Bind what stays in memory, for good."""
        for resident, binding in batch.resident:
            resident.convert_once(self._convert.run)
            binding.bind(binding.views(resident.memory, resident.slab.offsets))
        batch.is_settled = True


def _inside(units: Collection[str], specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    prefixes = tuple(f"{unit}." for unit in units)
    return [spec for spec in specs if spec.name.startswith(prefixes)]
