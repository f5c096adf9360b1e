"""A running model's machinery, assembled from a plan: reader, ring, residents, hooks. It owns what has to be closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from airstream.backend import Backend
from airstream.backend.landing import HostLanding, Staging
from airstream.checkpoint.reader import Piece, Reader
from airstream.compat import KeyConversion
from airstream.errors import BudgetError, ClosedError
from airstream.footprint import Footprint
from airstream.layout import Slab, TensorSpec, pack
from airstream.model.binding import Binding
from airstream.model.residency import Residency, convert_slab
from airstream.model.rows import FetchRows, RowTable
from airstream.model.units import Parts
from airstream.plan import Plan
from airstream.streamer import Streamer, StreamStats
from airstream.units import format_bytes


class Engine:
    """Runs `model` by `plan`. Takes over `reader` and `backend`: they are closed with it.

    Reads the resident weights (blocking), then starts to read ahead. Peak bytes per memory: `plan.peak_bytes`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Parts,
        plan: Plan,
        footprint: Footprint,
        folder: Path,
        reader: Reader,
        backend: Backend,
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.device = backend.device
        self._footprint = footprint
        self._lock = threading.RLock()
        self._closing = ExitStack()
        self._closed = False
        self._closing.callback(backend.close)
        self._closing.callback(reader.close)
        try:
            convert = KeyConversion(model).convert
            by_unit = dict(parts.units) | ({parts.head[0]: parts.head[1]} if parts.head else {})
            slabs = [_slab(batch.units, by_unit, backend) for batch in plan.batches]
            residents = parts.resident
            if parts.head and plan.head == "resident":
                residents += parts.head[1]
            self._load_residents(model, residents, parts.rows, reader, backend, convert)
            self._streamer = Streamer(slabs, plan.ring_bytes, plan.prefetch_batches, reader, backend)
            self._closing.callback(self._streamer.close)
            self._residency = Residency(model, [batch.units for batch in plan.batches], slabs, self._streamer, convert)
            self._closing.callback(self._residency.close)
            self._streamer.start()
        except BaseException:
            self.close()
            raise

    @property
    def stats(self) -> StreamStats:
        return self._streamer.stats

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around every call of the model: one thread at a time, no autograd, nothing left bound after a failure."""
        with self._lock, torch.no_grad():
            if self._closed:
                raise ClosedError("the model is closed: load it again with from_pretrained()")
            try:
                yield
            except BaseException:
                self._residency.let_go()
                raise

    def admit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse a forward pass whose KV cache and activations would break the budget, before it has begun.

        Raises:
            BudgetError: with the numbers and what to change.
        """
        inputs = next((x for x in (kwargs.get("input_ids"), *args[:1], kwargs.get("inputs_embeds")) if x is not None), None)
        if inputs is None:
            return
        batch_size, tokens = inputs.shape[0], inputs.shape[1]
        past = kwargs.get("past_key_values")
        context = tokens + (past.get_seq_length() if hasattr(past, "get_seq_length") else 0)
        keep = kwargs.get("logits_to_keep", 0)
        logits = keep.numel() if isinstance(keep, torch.Tensor) else keep or tokens
        need = self._footprint.kv_bytes(batch_size, context)
        need += self._footprint.activation_bytes(batch_size, tokens, context, logits)
        if need > self.plan.work_bytes:
            raise BudgetError(
                f"{batch_size} x {context:,} tokens ({tokens:,} of them new, logits of {logits:,}) need "
                f"{format_bytes(need)} for KV cache and activations; max_memory leaves {format_bytes(self.plan.work_bytes)}. "
                "Raise max_memory, or shorten the prompt (generate() takes prefill_chunk_size) or the batch"
            )

    def close(self) -> None:
        """Give everything back. Idempotent. May be called from another thread while the model runs: its call raises."""
        self._closed = True
        if streamer := getattr(self, "_streamer", None):
            streamer.close()  # wakes a thread that waits for weights, which then leaves the lock
        with self._lock:
            self._closing.close()

    def _load_residents(
        self,
        model: PreTrainedModel,
        residents: Sequence[TensorSpec],
        rows: Mapping[str, TensorSpec],
        reader: Reader,
        backend: Backend,
        convert: Any,
    ) -> None:
        """Read what stays, bind it for good, and put row tables where rows are read from disk."""
        distinct = {(spec.pieces or spec.name): spec for spec in reversed(residents)}
        slab = pack(distinct.values(), backend.packing)
        memory = backend.allocate(slab.nbytes)
        fence = backend.new_fence()
        backend.begin_fill()
        reader.read(slab.pieces, backend.landing(memory))
        backend.end_fill(fence)
        backend.wait_filled(fence)
        convert_slab(slab, memory, convert)
        in_memory = {spec.pieces: slab.offsets[spec.name] for spec in distinct.values() if spec.pieces}
        tables = [spec for spec in rows.values() if spec.pieces not in in_memory]
        shared = [spec for spec in rows.values() if spec.pieces in in_memory]
        kept = [*residents, *shared]
        offsets = {spec.name: in_memory.get(spec.pieces, slab.offsets.get(spec.name, 0)) for spec in kept}
        bindings = [Binding(model, [spec]) for spec in (*kept, *tables)]
        for binding, spec in zip(bindings, kept, strict=False):
            binding.bind(binding.views(memory, offsets))
        for binding, spec in zip(bindings[len(kept) :], tables, strict=True):
            fetch = _row_fetcher(spec, reader, self.device)
            binding.bind([RowTable(fetch, spec.shape, spec.dtype, self.device)])
        self._closing.callback(lambda: [binding.unbind() for binding in bindings])


def _slab(units: Sequence[str], by_unit: Mapping[str, Sequence[TensorSpec]], backend: Backend) -> Slab:
    return pack((spec for unit in units for spec in by_unit[unit]), backend.packing)


def _row_fetcher(spec: TensorSpec, reader: Reader, device: torch.device) -> FetchRows:
    """Reads rows of `spec`, whose bytes are one piece of a file, to `device`."""
    (table,) = spec.pieces
    stored_row, row = table.nbytes // spec.shape[0], spec.nbytes // spec.shape[0]
    staging = Staging(stored_row)

    def fetch(numbers: Sequence[int]) -> torch.Tensor:
        memory = torch.empty(len(numbers) * row, dtype=torch.uint8)
        pieces = [
            Piece(table.file, table.offset + number * stored_row, stored_row, position * row, table.cast)
            for position, number in enumerate(numbers)
        ]
        reader.read(pieces, HostLanding(memory, staging))
        return memory.view(spec.dtype).view(len(numbers), *spec.shape[1:]).to(device)

    return fetch
