"""The executor carries out one plan on a model: the streamer, the hooks, the tables. A new plan has a new executor.

It knows what has to be read first. It decides nothing, and refuses to know when a plan changes. What stays in memory
belongs to the store, and outlives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain

from airstream.layout.parts import Kind, Parts
from airstream.layout.tensors import TensorSpec
from airstream.model.binding import Binder
from airstream.model.direct import Direct
from airstream.model.residency import Residency
from airstream.model.residents import bind_tables
from airstream.model.unit_hooks import UnitHooks
from airstream.plan.facts import ModelFacts
from airstream.plan.plan import Plan
from airstream.streaming.fill import Fill, Resident
from airstream.streaming.store import Store
from airstream.streaming.streamer import Streamer
from airstream.system.closing import Closing
from airstream.transfer.machinery import Machinery


class Executor:
    """Hooks `plan` into the modules of `binder`.

    Allocates what stays in `store` and the ring; reads nothing before it is started.

    Attributes:
        is_closing: it has been closed, or that has begun, and an interrupt has come.
    """

    def __init__(
        self,
        binder: Binder,
        parts: Parts,
        facts: ModelFacts,
        store: Store,
        machinery: Machinery,
        direct: Direct,
        plan: Plan,
    ) -> None:
        fills = store.change_to(plan, facts)
        self.is_closing = False
        self._closing = closing = Closing()
        try:
            order = _order(len(plan.batches), fills, _first_batches(parts, plan))
            self.streamer = Streamer(fills, plan.ring_bytes, plan.prefetch_batches, machinery, order)
            closing.callback(self.streamer.close)
            units = [batch.units for batch in plan.batches]
            self.residency = Residency(binder, units, fills, self.streamer)
            closing.callback(self.residency.close)
            hooks = UnitHooks(self.residency, binder.modules, direct, machinery.probe, machinery.stats)
            closing.callback(hooks.close)
            resident = partial(_resident, store, parts)
            self._tables = bind_tables(binder, parts.specs_of(Kind.TABLE), resident, machinery)
            for binding in self._tables:
                closing.callback(binding.unbind)
            self._has_one_stack = len(parts.stacks) == 1
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Begin to read ahead, if it is known what will be asked for first: of several stacks, some may go unused."""
        if self._has_one_stack:
            self.streamer.start()

    def after_fork(self) -> None:
        """In a forked child: begin to read anew. What stays in memory is here, shared with the parent."""
        self.streamer.after_fork()
        self.start()

    def check(self) -> None:
        """Raise UnsupportedError if somebody has changed a weight in any layer or table."""
        self.residency.check()
        self.check_tables()

    def check_lent(self) -> None:
        """Raise UnsupportedError if somebody has changed what was lent to a layer, when it was not any more."""
        self.residency.check_lent()

    def check_tables(self) -> None:
        """Raise UnsupportedError if somebody has changed a weight in a table."""
        for binding in self._tables:
            binding.check()

    def close(self) -> None:
        """Unbind everything, stop reading, give the ring back. Idempotent. What stays in the store stays."""
        self.is_closing = True
        self._closing.close()


def _first_batches(parts: Parts, plan: Plan) -> list[int]:
    """The batch that each stack of layers begins with."""
    sizes = [len(batches) for batches in parts.in_batches(plan.layers_per_batch)]
    return list(accumulate(sizes, initial=0))[: len(sizes)]


def _order(num_batches: int, fills: Sequence[Fill], firsts: Sequence[int]) -> list[int]:
    """What to read first: the first batch of a stack of layers, then tables that stay, then its other batches.

    Nothing ever asks for a table: read last, as they are listed, they would still be coming in while the first token
    after the prompt is computed. They are named behind every stack, for any of them may go unused.
    """
    tables = range(num_batches, len(fills))
    batches = ((batch, *tables) if batch in firsts else (batch,) for batch in range(num_batches))
    return [*chain.from_iterable(batches)] or [*tables]


def _resident(store: Store, parts: Parts, table: TensorSpec) -> Resident | None:
    """Where the bytes of `table` stay, if they do: under its own name, or as what it is tied to."""
    tied = (spec for spec in parts.specs_of(Kind.TABLE, Kind.HEAD) if spec.identity == table.identity)
    names = [table.name, *(spec.name for spec in tied)]
    return next(filter(None, map(store.resident, names)), None)
