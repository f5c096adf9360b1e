"""The observer watches a model run, for profiles and for whoever shows progress. It changes nothing.

It knows passes, calls of `generate`, and who watches. It refuses to know what each of them cost: see `recorder`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from airstream.plan.plan import Plan
from airstream.plan.request import HOST, Request, Workload
from airstream.plan.step import Step
from airstream.profiling.call import Call
from airstream.profiling.profile import Profile
from airstream.profiling.profile_data import MemoryUse
from airstream.profiling.recorder import Recorder
from airstream.rates.facts import Rate
from airstream.reporting.probe import DISK, H2D, HOST_COPY, now
from airstream.system.memory import PeakMemory, process_bytes
from airstream.transfer.machinery import Machinery


class Observer:
    """One for every running model. Passes and calls are reported by the threads that run it, whoever has the turn.

    Args:
        host_bytes: resident memory of the process before the model was loaded.
        plan: gives the plan that is being followed.

    Attributes:
        watchers: told every step, by the thread that took it, when it is known what it gives: of a generation, before
            its next pass; of a pass that nobody generates with, at its end.
    """

    def __init__(
        self,
        machinery: Machinery,
        request: Request,
        host_bytes: int,
        plan: Callable[[], Plan],
    ) -> None:
        self.watchers: list[Callable[[Step], None]] = []
        self.last_profile: Profile | None = None
        self._request = request
        self._probe = machinery.probe
        self._reader = machinery.reader
        self._backend = machinery.backend
        self._host_bytes = host_bytes
        self._device_bytes = self._backend.used_bytes()
        self._plan = plan
        self._recorder: Recorder | None = None
        self._inside = False
        self._mine = threading.local()  # `call`: the innermost call that this thread is in, and who records it

    def after_fork(self) -> None:
        """In a forked child: passes and calls of the parent's threads do not end here."""
        self._inside = False
        self._mine = threading.local()
        self._resume(None)

    @property
    def rates(self) -> dict[str, Rate]:
        """What each link can do, as measured or assumed."""
        return _rates(self._request, self._reader.direct)

    @property
    def is_inside(self) -> bool:
        """A pass is under way."""
        return self._inside

    def leave_pass(self) -> None:
        """No pass is under way, whatever an interrupt has kept this from being told."""
        self._inside = False

    def start(self) -> Profile:
        """Begin a profile. It grows until another one begins."""
        plan = self._plan()
        profile = Profile(plan.model, plan.device, plan.dtype, now(), self.rates, self._reader.direct)
        self._backend.forget_peak()
        self._resume(Recorder(profile, self._backend, partial(self._measure, PeakMemory(self._host_bytes))))
        self.last_profile = profile
        return profile

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """A profile of what happens inside; one that is under way pauses for as long."""
        outer = self._recorder
        try:
            yield self.start()
            if self._recorder is not None:
                self._recorder.measure_memory()
        finally:
            self._resume(outer)

    def _resume(self, recorder: Recorder | None) -> None:
        self._recorder = self._probe.listener = recorder

    @contextmanager
    def one_call(
        self, prompt_tokens: int, is_draft: bool, turn: Callable[[], AbstractContextManager[object]]
    ) -> Iterator[None]:
        """Around `generate` on a prompt of so many tokens, 0 if that is not known. Others may be under way.

        Args:
            is_draft: it drafts for the call that it is inside of, if it is inside of one.
            turn: nothing else computes while it lasts.
        """
        outer, recorder = self._my_call, self._recorder
        if is_draft and outer[0] is not None:
            with outer[0].drafting():
                yield
            return
        call = Call(prompt_tokens)
        if recorder is not None:
            with turn():
                recorder.begin_call(call)
        self._mine.call = call, recorder
        try:
            yield
        finally:
            self._mine.call = outer
            if recorder is not None:
                with turn():
                    recorder.end_call(call)

    @property
    def _my_call(self) -> tuple[Call | None, Recorder | None]:
        return getattr(self._mine, "call", (None, None))

    def accept(self, tokens: int) -> None:
        """The generation of the calling thread gives each sequence so many tokens, for the pass that is over."""
        if (call := self._my_call[0]) is not None:
            self._tell(call.accept(tokens))

    def correct(self, tokens: int | None) -> None:
        """The generation of the calling thread has a result of so many tokens per sequence, if that is known."""
        if (call := self._my_call[0]) is not None:
            self._tell(call.correct(tokens))

    def _tell(self, step: Step | None) -> None:
        if step is not None:
            for watcher in tuple(self.watchers):
                watcher(step)

    @contextmanager
    def one_pass(self, work: Workload | None) -> Iterator[None]:
        """Around a forward pass that asks for `work`. One within another one, of the base model, is part of it."""
        if self._inside:
            yield
            return
        (call, listening), recorder, is_complete = self._my_call, self._recorder, False
        if call is not None:
            self._tell(call.begin_pass(work))
        self._inside = True
        if recorder is not None:
            recorder.begin_pass(work, call if recorder is listening else None)
        try:
            yield
            is_complete = True
        finally:
            self._inside = False
            if recorder is not None:
                recorder.end_pass(is_complete)
        if call is not None:
            call.end_pass(work)
        else:
            self._tell(Step.of(work, 0))

    def used_bytes(self) -> int:
        """Host memory that the process uses above what it did before the model was loaded."""
        return process_bytes() - self._host_bytes

    def num_layers(self) -> int:
        """The layers of all stacks. They are children of lists, and have numbers for names; the lm_head has not."""
        units = (unit for batch in self._plan().batches for unit in batch.units)
        return sum(unit.rpartition(".")[2].isdigit() for unit in units)

    def forget_spans(self) -> None:
        """What has been moved was not for a pass."""
        if self._recorder is not None:
            self._recorder.forget_spans()

    def _measure(self, host: PeakMemory, profile: Profile) -> None:
        """Note in `profile` what memory is used by now, and what the plan says, which may be another one by now."""
        plan = self._plan()
        profile.predicted_seconds = plan.prediction.decode_seconds if plan.prediction else None
        profile.is_predicted_by_guess = bool(plan.prediction and plan.prediction.assumed)
        profile.sizes.append((now(), "host memory", self.used_bytes()))
        if len(plan.tiers) > 1:
            profile.sizes.append((now(), "device memory", self._backend.used_bytes() - self._device_bytes))
        for name, tier in plan.tiers.items():
            peak = host.rise() if name == HOST else self._backend.peak_bytes() - self._device_bytes
            profile.memory[name] = MemoryUse(peak, tier.peak_bytes, tier.budget_bytes)


def _rates(request: Request, is_direct: bool) -> dict[str, Rate]:
    """What each link can do, as measured or assumed."""
    facts = request.hardware
    if facts is None:
        return {}
    rates = {DISK: facts.disk if is_direct else None, HOST_COPY: facts.host_copy, H2D: facts.h2d}
    return {link: rate for link, rate in rates.items() if rate is not None}
