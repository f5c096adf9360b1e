"""A running model's machinery, assembled from a plan, and changed for another one when memory has to be used otherwise.

It owns what has to be closed: reader, backend, resident weights, and the executor of the current plan.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel

from airstream.backend import Backend
from airstream.checkpoint.index import CheckpointIndex
from airstream.checkpoint.reader import Reader
from airstream.compat import Quantizer, conversion_for
from airstream.errors import BudgetError
from airstream.model.binding import OriginalModules, take_out
from airstream.model.conversion import convert_slab, converter_of
from airstream.model.direct import refuse_when_closed
from airstream.model.executor import Executor
from airstream.model.forked import begin_anew
from airstream.model.gate import Gate
from airstream.model.generations import Generations
from airstream.model.head import take_sequences_apart
from airstream.model.observer import Observer
from airstream.model.residents import bind_residents
from airstream.model.store import Store
from airstream.model.stored import all_stored
from airstream.model.units import Parts
from airstream.plan import AdapterFacts, ModelFacts, Plan, Request, Workload, make_plan, smallest_plan
from airstream.probe import Probe
from airstream.stats import MeasuredLink, StreamStats
from airstream.units import format_bytes

logger = logging.getLogger(__name__)

MIN_GAIN = 0.02
"""Of all weights: what has to become resident besides for a change of plan to be worth its while."""

GROWTH = 1.25
"""When a sequence outgrows its plan, the next one is made for so much more context, so that it lasts a while."""


class Engine:
    """Runs `model` by `plan`. Takes over `reader` and `backend`: they are closed with it.

    Reads the small weights outside the layers (blocking); layers follow when the model runs, or, if the plan is not
    going to change with the first call, at once. Peak bytes per memory: `plan.peak_bytes`.

    Args:
        facts, request: what `plan` was made of, and other plans can be.
        probe: told by `reader` and `backend` what they do.
        host_bytes: resident memory of the process before the model was loaded.
        is_profiling: profile everything from the beginning.
        is_final: calls are to be made to fit the plan, not the plan the calls.
        quantizer: of the checkpoint, if it is quantised.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Parts,
        facts: ModelFacts,
        request: Request,
        index: CheckpointIndex,
        plan: Plan,
        folder: Path,
        reader: Reader,
        backend: Backend,
        probe: Probe,
        host_bytes: int,
        is_profiling: bool,
        is_final: bool,
        quantizer: Quantizer | None = None,
    ) -> None:
        self.plan = self._normal = plan
        self.folder = folder
        self.device = backend.device
        self.stats = StreamStats()
        self.modules = OriginalModules(model)
        self.head = model.get_submodule(parts.head[0]) if parts.head else None
        self._specs = parts.specs
        self._facts, self._adapters = facts, AdapterFacts()
        self._request = request
        self._is_final = is_final
        self._executor: Executor | None = None
        self._reader = reader
        self._backend = backend
        self.gate = Gate(self._get_ready, self._let_go, self._after_fork)
        self._generations = Generations(self.gate, self, self.modules)
        self.between_generations = self._generations.between
        self._closing = self.gate.closing
        self._closing.callback(backend.close)
        self._closing.callback(reader.close)
        try:
            self.observer = Observer(probe, backend, request, lambda: reader.direct, host_bytes, lambda: self.plan)
            keys = conversion_for(model, index, quantizer)
            convert = converter_of(keys, partial(convert_slab, keys, probe, backend.moment))
            self.stored = all_stored(self._specs.values(), reader, convert, self.device)
            self._residents = bind_residents(model, parts.resident, self.stored, reader, backend, convert)
            self._closing.callback(self._unbind_residents)
            if self.head is not None and self.device.type == "cpu":
                self._closing.callback(take_sequences_apart(self.head))
            leaving = [*chain.from_iterable(parts.units.values()), *(parts.head[1] if parts.head else ())]
            take_out(self.modules, leaving, self.stored, self.device)
            store = Store(self._specs, backend)
            self._closing.callback(store.close)
            self._closing.callback(self._stop)
            self._closing.callback(lambda: refuse_when_closed(self.modules.owners(leaving), self.gate))
            self._execute = partial(
                Executor,
                self.modules,
                parts,
                facts,
                self.stored,
                store,
                reader,
                backend,
                convert,
                self.stats,
                probe,
                self.gate,
            )
            if is_profiling:
                self.observer.start()
            self._executor = self._execute(plan)
            if is_final:
                self._executor.start()
        except BaseException:
            self.close()
            raise

    def guard(self) -> AbstractContextManager[None]:
        """Around every use of the model: one thread at a time, no autograd, nothing left bound after a failure."""
        return self.gate.inside()

    def generation(self, work: Workload | None) -> AbstractContextManager[None]:
        """Around a generation that asks for `work` at its end. Others take turns with it, between passes."""
        return self._generations.one(work, self.expect)

    @contextmanager
    def one_pass(self, work: Workload | None, has_cache: bool, prepare: Callable[[], None]) -> Iterator[None]:
        """Around a forward pass that asks for `work`, if that is known. BudgetError if it does not fit."""
        with self._generations.one_pass(work, has_cache) as beside:
            prepare()
            if beside is not None:
                self.admit(beside)
            with self.observer.one_pass(lambda: work):
                yield

    @contextmanager
    def part_pass(self, work: Callable[[], Workload | None]) -> Iterator[None]:
        """Around a forward pass of a part that is called alone, or inside of a pass of the whole model."""
        with self._generations.one_pass(None, False), self.observer.one_pass(work):
            yield

    def has_room(self, work: Workload) -> bool:
        """Whether KV caches and activations of `work` fit, if need be in place of weights that stay."""
        return work.bytes(self._facts.footprint) <= self.plan.work_bytes or self._with_room_for(work) is not None

    def kv_bytes(self, work: Workload) -> int:
        """Of the KV caches of `work`."""
        return work.kv_bytes(self._facts.footprint)

    def _get_ready(self) -> None:
        if self._executor is None:  # an earlier change of plan was interrupted
            self._change(self.plan)
        self._check_between()

    def _let_go(self) -> None:
        if self._executor is not None:
            self._executor.residency.let_go()

    def _after_fork(self) -> None:
        begin_anew(self.device, self.gate.turns, self._generations, self.observer, self._executor)

    def expect(self, work: Workload | None) -> None:
        """A generation is about to begin that asks for `work` at its end, if that is known.

        What it does not need of the memory that was set aside for KV cache and activations holds weights meanwhile.
        """
        if work is None:
            return
        fits = work.bytes(self._facts.footprint) <= self.plan.work_bytes
        if self._is_final or (fits and not self.plan.streamed_bytes):
            return
        plan = self._with_room_for(work)
        if plan is None:
            return  # it may end early; a pass that does not fit is refused when it comes to it
        gain = plan.resident_bytes + plan.hosted_bytes - self.plan.resident_bytes - self.plan.hosted_bytes
        if not fits or gain > MIN_GAIN * plan.checkpoint_bytes:
            self._normal = plan
            self._change(plan)

    def admit(self, work: Workload) -> None:
        """Make room for a forward pass, or refuse it, before it has begun.

        If its KV cache and activations need more than is set aside for them, resident weights are given up; when it
        needs no more than usual, they come back.

        Raises:
            BudgetError: nothing more can be given up; with the numbers and what to change.
        """
        self.gate.check_open()
        need = work.bytes(self._facts.footprint)
        if need > self.plan.work_bytes:
            self._outgrow(work, need)
        elif self.plan is not self._normal and not work.beside_bytes and need <= self._normal.work_bytes:
            self._change(self._normal)

    def make_room(self, adapters: AdapterFacts) -> None:
        """Adapters that cost this much are beside the model from now on, in place of those that were.

        Raises:
            BudgetError: they do not fit, even if no weight stays in memory.
        """
        if adapters == self._adapters:
            return
        facts = self._facts.with_adapters(adapters)
        plan = make_plan(facts, self._request)
        self._check_untouched()
        self._facts, self._adapters, self._normal = facts, adapters, plan
        self._change(plan)

    def _check_untouched(self) -> None:
        """Raise if somebody has changed a weight, anywhere."""
        self._check_between()
        if self._executor is not None:
            self._executor.check()

    def _unbind_residents(self) -> None:
        for binding in self._residents:
            binding.unbind()

    def _check_between(self) -> None:
        """Raise if somebody has changed a weight outside the layers, which check for themselves when they run."""
        for binding in self._residents:
            binding.check()
        if self._executor is not None:
            self._executor.check_tables()

    def _outgrow(self, work: Workload, need: int) -> None:
        """Change to a plan with room for `work`, and some more if there is some."""
        plan = self._with_room_for(replace(work, context=int(GROWTH * work.context))) or self._with_room_for(work)
        if plan is None:
            left = smallest_plan(self._facts, replace(self._request, max_context=1)).work_bytes
            raise BudgetError(
                f"{work.batch_size} x {work.context:,} tokens ({work.tokens:,} of them new, logits of "
                f"{work.logits:,}{', images' if work.pixel_values else ''}) need {format_bytes(need)} for KV cache and "
                f"activations, max_memory leaves {format_bytes(left)}. "
                "Raise max_memory, or shorten the prompt (generate() takes prefill_chunk_size) or the batch"
            )
        logger.warning(
            "%s x %s tokens need %s for KV cache and activations: %s of resident weights are streamed from now on",
            work.batch_size,
            f"{work.context:,}",
            format_bytes(need),
            format_bytes(self.plan.resident_bytes - plan.resident_bytes),
        )
        self._change(plan)

    def _with_room_for(self, work: Workload) -> Plan | None:
        request = replace(self._request, max_context=work.context, max_batch_size=work.batch_size, workload=work)
        try:
            return make_plan(self._facts, request)
        except BudgetError:
            return None

    @torch.inference_mode(False)  # torch counts no changes of what is made in it
    def _change(self, plan: Plan) -> None:
        """Go on by `plan`, between two passes. What stays in memory under both plans stays where it is.

        Raises:
            UnsupportedError: somebody has changed a weight, which would be lost with its memory.
        """
        self._check_untouched()
        self._stop()
        self.plan = plan
        self._executor = self._execute(plan)
        self.gate.check_open()  # another thread may have closed the engine, and not have seen this executor
        self._executor.start()

    def _stop(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()

    def measure_link(self) -> MeasuredLink:
        """One pass over all streamed layers without computing. Blocks until the last byte has arrived."""
        with self.guard():
            assert self._executor is not None  # an open engine has one
            try:
                return self._executor.streamer.measure_link()
            finally:
                self.observer.forget_spans()

    def abandon(self) -> None:
        """`close`, for the garbage collector, which may call from one of the threads that `close` waits for."""
        self.gate.shut(is_abandoned=True)
        thread = threading.current_thread()
        if self._reader.is_worker(thread) or self._backend.is_worker(thread):
            threading.Thread(target=self.close, name="airstream-closer").start()
        else:
            self.close()
            self.gate.wait_for_rest(self._generations.threads)

    def close(self) -> None:
        """Give everything back, what a pass under way needs when it is over. Idempotent. Calls under way raise."""
        self.gate.shut()
        if executor := self._executor:
            executor.streamer.close()  # wakes a thread that waits for weights, which then gives back the turn
        self._generations.wake()
        self.gate.finish_closing()
