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
from airstream.checkpoint.reader import Reader
from airstream.compat import KeyConversion
from airstream.errors import BudgetError, ClosedError
from airstream.footprint import Footprint
from airstream.layout import TensorSpec
from airstream.model.head import avoid_weight_copy
from airstream.model.residency import Residency
from airstream.model.residents import bind_residents
from airstream.model.units import Parts
from airstream.plan import Plan
from airstream.slab import Slab, pack
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
        self._reader = reader
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
            for binding in bind_residents(model, residents, parts.rows, reader, backend, convert):
                self._closing.callback(binding.unbind)
            if parts.head and self.device.type == "cpu":
                self._closing.callback(avoid_weight_copy(model.get_submodule(parts.head[0])).remove)
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
        inputs = next(
            (x for x in (kwargs.get("input_ids"), *args[:1], kwargs.get("inputs_embeds")) if x is not None), None
        )
        if inputs is None:
            return
        batch_size, tokens = inputs.shape[0], inputs.shape[1]
        past = kwargs.get("past_key_values")
        context = tokens + (past.get_seq_length() if past is not None and hasattr(past, "get_seq_length") else 0)
        keep = kwargs.get("logits_to_keep", 0)
        logits = keep.numel() if isinstance(keep, torch.Tensor) else keep or tokens
        need = self._footprint.kv_bytes(batch_size, context)
        need += self._footprint.activation_bytes(batch_size, tokens, context, logits)
        if need > self.plan.work_bytes:
            raise BudgetError(
                f"{batch_size} x {context:,} tokens ({tokens:,} of them new, logits of {logits:,}) need "
                f"{format_bytes(need)} for KV cache and activations, max_memory leaves "
                f"{format_bytes(self.plan.work_bytes)}. "
                "Raise max_memory, or shorten the prompt (generate() takes prefill_chunk_size) or the batch"
            )

    def measure_link(self) -> tuple[int, float]:
        """Bytes and wall seconds of one pass over all streamed layers without computing. Blocks for that long."""
        with self.guard():
            return self._streamer.measure_link()

    def abandon(self) -> None:
        """`close`, for the garbage collector, which may call from one of the threads that `close` waits for."""
        if self._reader.is_worker(threading.current_thread()):
            threading.Thread(target=self.close, name="airstream-closer").start()
        else:
            self.close()

    def close(self) -> None:
        """Give everything back. Idempotent. May be called from another thread while the model runs: its call raises."""
        self._closed = True
        if streamer := getattr(self, "_streamer", None):
            streamer.close()  # wakes a thread that waits for weights, which then leaves the lock
        with self._lock:
            self._closing.close()


def _slab(units: Sequence[str], by_unit: Mapping[str, Sequence[TensorSpec]], backend: Backend) -> Slab:
    return pack((spec for unit in units for spec in by_unit[unit]), backend.packing)
