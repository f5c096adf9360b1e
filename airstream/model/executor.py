"""What executes one plan on a model: the streamer, the hooks, the tables. Decides nothing; a new plan has a new one."""

from __future__ import annotations

from contextlib import ExitStack

from transformers import PreTrainedModel

from airstream.backend import Backend
from airstream.checkpoint.reader import Reader
from airstream.fill import Kept
from airstream.layout import TensorSpec
from airstream.model.residency import Convert, Residency
from airstream.model.residents import bind_tables
from airstream.model.store import Store
from airstream.model.units import Parts
from airstream.plan import ModelFacts, Plan
from airstream.streamer import Streamer, StreamStats


class Executor:
    """Hooks `plan` into `model`. Allocates what stays in `store` and the ring; reads nothing before it is started."""

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Parts,
        facts: ModelFacts,
        store: Store,
        reader: Reader,
        backend: Backend,
        convert: Convert,
        stats: StreamStats,
        plan: Plan,
    ) -> None:
        self._closing = ExitStack()
        fills = store.fills(plan, facts)
        self.streamer = Streamer(fills, plan.ring_bytes, plan.prefetch_batches, reader, backend, stats)
        self._closing.callback(self.streamer.close)
        self.residency = Residency(model, [batch.units for batch in plan.batches], fills, self.streamer, convert)
        self._closing.callback(self.residency.close)

        def kept(table: TensorSpec) -> Kept | None:
            tied = (
                next((spec.name for spec in parts.head[1] if spec.pieces == table.pieces), None) if parts.head else None
            )
            return store.kept(table.name) or (store.kept(tied) if tied else None)

        for binding in bind_tables(model, parts.rows, kept, reader, backend, convert):
            self._closing.callback(binding.unbind)

    def close(self) -> None:
        """Unbind everything, stop reading, give the ring back. Idempotent. What stays in the store stays."""
        self._closing.close()
