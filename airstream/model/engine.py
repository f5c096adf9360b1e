"""The engine runs a model by a plan, and changes to another plan when memory has to be used otherwise.

It owns what has to be closed: reader, backend, resident weights, and the executor of the current plan.

It knows in which order things are opened, changed and closed. It refuses to know which plan is better (`plans`), whose
turn it is (`gate`, `generations`), and how a layer gets its weights (`executor`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from airstream.compat.gguf import conversion_for
from airstream.compat.key_conversion import KeyConversion
from airstream.compat.traits import vocabulary_of
from airstream.footprint.lm_head import take_sequences_apart
from airstream.layout.parts import Kind
from airstream.loading.prepared import Prepared
from airstream.model.binding import Binder, OriginalModules, take_out
from airstream.model.conversion import converter_of
from airstream.model.direct import Direct, refuse_when_closed, take_turns
from airstream.model.executor import Executor
from airstream.model.forked import begin_anew
from airstream.model.gate import Gate
from airstream.model.generations import Generations
from airstream.model.packed import stand_in_for_packed
from airstream.model.plans import Plans
from airstream.model.residents import bind_residents
from airstream.model.row_table import watch_tables
from airstream.model.shortage import explained
from airstream.model.state_dicts import check_state_dicts
from airstream.model.stored_in_files import all_stored
from airstream.plan.facts import AdapterFacts
from airstream.plan.plan import Plan
from airstream.plan.policy import GIVEN_BACK_BYTES
from airstream.plan.request import Workload
from airstream.profiling.observer import Observer
from airstream.reporting.stats import MeasuredLink
from airstream.streaming.measure import measure_link
from airstream.streaming.store import Store
from airstream.system.heap import giving_back
from airstream.system.in_use import hold
from airstream.system.kernels import KernelLimit
from airstream.transfer.machinery import Machinery


class Engine:
    """Runs a model by `plan`. Takes over `machinery`: it is closed with it.

    Reads the small weights outside the layers (blocking); layers follow when the model runs, or, if the plan is not
    going to change with the first call, at once. Peak bytes per memory: `plan.peak_bytes`.

    Args:
        prepared: the model, and what `plan` was made of, as other plans can be.
        host_bytes: resident memory of the process before the model was loaded.
    """

    def __init__(self, prepared: Prepared, plan: Plan, machinery: Machinery, host_bytes: int) -> None:
        options, model = prepared.options, prepared.model
        is_final = options.max_context is not None  # calls are made to fit the plan, not the plan the calls
        self.plans = Plans(plan, prepared.facts, prepared.request, is_final, self._change)
        self.folder, self.device = prepared.folder, prepared.device
        self._kernel_limit = KernelLimit(model.dtype if self.device.type == "cpu" else None)
        self.stats = machinery.stats
        self.modules = OriginalModules(model)
        self.head = model.get_submodule(prepared.parts.head.name) if prepared.parts.head else None
        self.gate = Gate(self._get_ready, self._let_go, self._after_fork)
        self._direct = Direct(self.gate)
        self._generations = Generations(self.gate, self.plans, self.modules)
        self.between_generations = self._generations.between
        self.machinery = machinery
        self._parts, self._facts = prepared.parts, prepared.facts  # no more of it: the model is not to be kept alive
        self._executor: Executor | None = None
        self.gate.closing.callback(hold(prepared.folder))
        self.gate.closing.callback(machinery.close)
        try:
            self.observer = Observer(machinery, prepared.request, host_bytes, lambda: self.plan)
            self._take_over(model, conversion_for(model, prepared.index, prepared.quantizer))
            if options.profiling_mode:
                self.observer.start()
            self._executor = self._execute(plan)
            if is_final:
                self._executor.start()
        except BaseException:
            self.close()
            raise

    def _take_over(self, model: PreTrainedModel, keys: KeyConversion) -> None:
        """Read what stays outside the layers, and leave placeholders for the rest."""
        parts, closing = self._parts, self.gate.closing
        convert = converter_of(keys, self.machinery.probe, self.machinery.backend.moment)
        self.stored = all_stored(parts.specs.values(), self.machinery.reader, convert, self.device)
        self._binder = Binder(self.modules, self.stored, convert, self.gate.asking)
        self._residents = bind_residents(self._binder, parts.specs_of(Kind.RESIDENT), self.machinery)
        closing.callback(self._unbind_residents)
        closing.callback(take_turns(self.modules.owners(parts.specs_of(Kind.RESIDENT)), self._direct))
        if self.head is not None and self.device.type == "cpu":
            closing.callback(take_sequences_apart(self.head))
        leaving = parts.specs_of(Kind.LAYER, Kind.HEAD)
        watch_tables(model, vocabulary_of(model), closing)
        take_out(self.modules, leaving, self.stored, self.device)
        stand_in_for_packed(model, self.device)
        check_state_dicts(self.modules)
        self._store = Store(parts.specs, self.machinery.backend)
        closing.callback(self._store.close)
        closing.callback(self._stop)
        closing.callback(lambda: refuse_when_closed(self.modules.owners(leaving), self.gate))

    def _execute(self, plan: Plan) -> Executor:
        return Executor(self._binder, self._parts, self._facts, self._store, self.machinery, self._direct, plan)

    @property
    def plan(self) -> Plan:
        """The plan that is followed now."""
        return self.plans.current

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around every use of the model: one thread at a time, no autograd, nothing left bound after a failure.

        Raises:
            BudgetError: the machine has less memory than was planned for.
        """
        with explained(lambda: self.plan), self.gate.inside():
            yield

    @contextmanager
    def generation(self, work: Workload | None, is_asked: bool) -> Iterator[None]:
        """Around a generation that asks for `work` at its end. Others take turns with it, between passes.

        Args:
            is_asked: the caller says how long it may get. Else it may well end before, and the prompt alone has to fit.

        Raises:
            BudgetError, ArgumentError: it cannot be done, with what can be.
        """
        begin = partial(self.plans.expect, is_asked=is_asked)
        with explained(lambda: self.plan), self._generations.one(work, begin):
            yield

    @contextmanager
    def one_pass(self, work: Workload | None, has_cache: bool, prepare: Callable[[], None]) -> Iterator[None]:
        """Around a forward pass that asks for `work`, if that is known. BudgetError if it does not fit.

        Of a prompt's pass, what is freed leaves the process at once.
        """
        with explained(lambda: self.plan), self._generations.one_pass(work, has_cache) as beside:
            prepare()
            if beside is not None:
                self.plans.admit(beside)
            self._kernel_limit.set()
            gives_back = self.device.type == "cpu" and self.plans.activation_bytes(work) >= GIVEN_BACK_BYTES
            with giving_back(gives_back), self.observer.one_pass(work):
                yield
            self._check_lent()

    @contextmanager
    def part_pass(self, work: Callable[[], Workload | None], has_cache: bool) -> Iterator[None]:
        """Around a forward pass of a part: one that is called alone, or part of a pass of the whole model."""
        is_part = self.gate.turns.is_mine and self.observer.is_inside
        with self.one_pass(None if is_part else work(), has_cache, lambda: None):
            yield

    def _get_ready(self) -> None:
        if self._executor is None or self._executor.is_closing:  # an earlier change of plan was interrupted
            self._change(self.plan)
        self._check_between()

    def _let_go(self) -> None:
        self.observer.leave_pass()
        if self._executor is not None:
            self._executor.residency.recover()

    def _after_fork(self) -> None:
        begin_anew(self.device, self.gate.turns, self._generations, self.observer)
        if self._executor is not None:
            self._executor.after_fork()

    def make_room(self, adapters: AdapterFacts) -> None:
        """Adapters that cost this much are beside the model from now on, in place of those that were.

        Raises:
            BudgetError: they do not fit, even if no weight stays in memory.
        """
        if adapters != self.plans.adapters:
            self._check_untouched()
            self.plans.make_room(adapters)

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
        self._check_lent()

    def _check_lent(self) -> None:
        """Raise if the pass, or somebody after it, has written to what was lent to a layer before."""
        if self._executor is not None:
            self._executor.check_lent()

    @torch.inference_mode(False)  # torch counts no changes of what is made in it
    def _change(self, plan: Plan) -> None:
        """Go on by `plan`, between two passes. What stays in memory under both plans stays where it is.

        Raises:
            UnsupportedError: somebody has changed a weight, which would be lost with its memory.
        """
        self._check_untouched()
        self._stop()
        self.plans.current = plan
        self._executor = self._execute(plan)
        self.gate.check_open()  # another thread may have closed the engine, and not have seen this executor
        self._executor.start()

    def _stop(self) -> None:
        if self._executor is not None:
            self._executor.close()
        self._executor = None

    def measure_link(self) -> MeasuredLink:
        """One pass over all streamed layers without computing. Blocks until the last byte has arrived."""
        with self.guard():
            assert self._executor is not None  # an open engine has one
            try:
                return measure_link(self._executor.streamer)
            finally:
                self.observer.forget_spans()

    def abandon(self) -> None:
        """`close`, for the garbage collector, which may call from one of the threads that `close` waits for."""
        self.gate.shut(is_abandoned=True)
        thread = threading.current_thread()
        if self.machinery.is_worker(thread):
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
