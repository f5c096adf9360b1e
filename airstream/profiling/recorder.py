"""The recorder turns what a probe reports into a profile, one pass at a time.

Everything happens on two clocks at once: the host's, and the stream on which the device computes. While a pass runs,
points on both are only noted. Once it is over the recorder waits for the device, a single time, and reads them all.

It knows spans and points in time. It refuses to know who reports them, and how a profile is shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from airstream.plan.request import Workload
from airstream.profiling.call import DECODE, PREFILL, Call, phase_of
from airstream.profiling.costs import COMPUTE, PYTHON, ROWS, SCHEDULING, STALL, Costs, LinkUse, add_causes
from airstream.profiling.intervals import Interval, blame, merge, total
from airstream.profiling.profile import Profile
from airstream.profiling.profile_data import MAX_SPANS, PassProfile
from airstream.reporting.probe import LINKS, Moment, Span, now
from airstream.transfer.base import Backend

MEMORY_SECONDS = 0.1
"""Memory is measured no more often than this: asking the system takes as long as a small layer."""


@dataclass(slots=True)
class _Wait:
    """From `since` on the host's clock, but not before the stream has passed point `after`, to point `until`."""

    since: float
    after: int
    until: int = -1
    unit: str = ""
    is_for_rows: bool = False


@dataclass(slots=True)
class _Unit:
    name: str
    start: int
    end: int = -1


@dataclass(slots=True)
class _Pass:
    """A pass that is under way: points in time as they were noted, and what lies between them, by their numbers.

    The first point is where the pass begins, the second where its forward pass does; `end` is where that ends.
    """

    work: Workload | None
    phase: str
    points: list[Moment]
    call: Call | None
    end: int = -1
    waits: list[_Wait] = field(default_factory=list)
    units: list[_Unit] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)
    is_complete: bool = False


class Recorder:
    """Listens to a probe, and keeps `profile` up to date. Passes and calls are reported by the thread that computes.

    Args:
        measure: notes in the profile what memory is used by now, and what the plan says by now.
    """

    def __init__(self, profile: Profile, backend: Backend, measure: Callable[[Profile], None]) -> None:
        self.profile = profile
        self._backend = backend
        self._measure = measure
        self._pending: deque[Span] = deque(maxlen=MAX_SPANS)
        self._pass: _Pass | None = None
        self._number = 0
        self._finished_at = 0.0
        self._counted: dict[str, list[Interval]] = {}
        self._measured_at = 0.0
        backend.start_clock()

    def add(self, span: Span) -> None:
        """Keep a span that has ended, or has been queued, for the pass it belongs to."""
        self._pending.append(span)

    def ring_holds(self, nbytes: int) -> None:
        """Note that the ring holds `nbytes` from now on."""
        self.profile.sizes.append((now(), "ring", nbytes))

    def begin_wait(self) -> None:
        """Note that computation begins to wait for weights."""
        if self._pass is not None:
            self._pass.waits.append(_Wait(now(), after=self._note(self._pass)))

    def waited(self, read_bytes: int, host_bytes: int) -> None:
        """End the wait for a layer batch, which took so many bytes from disk and from host memory."""
        if self._pass is not None and self._end_wait(self._pass):
            self._pass.costs.read_bytes += read_bytes
            self._pass.costs.host_bytes += host_bytes

    def waited_for_rows(self, nbytes: int) -> None:
        """End the wait for embedding rows, of which `nbytes` came from disk."""
        if self._pass is not None and self._end_wait(self._pass):
            self._pass.waits[-1].is_for_rows = True
            self._pass.costs.row_bytes += nbytes

    def begin_unit(self, name: str) -> None:
        """Note that the module `name` begins to compute. The wait before it was for it."""
        if self._pass is not None:
            if self._pass.waits and not self._pass.waits[-1].is_for_rows:
                self._pass.waits[-1].unit = self._pass.waits[-1].unit or name
            self._pass.units.append(_Unit(name, self._note(self._pass)))

    def end_unit(self) -> None:
        """Note that the module that computes has ended."""
        if self._pass is not None and self._pass.units and self._pass.units[-1].end < 0:
            self._pass.units[-1].end = self._note(self._pass)

    def _end_wait(self, current: _Pass) -> bool:
        """End the wait that has begun; False if it began before anybody listened."""
        if not current.waits or current.waits[-1].until >= 0:
            return False
        current.waits[-1].until = self._note(current)
        return True

    def _note(self, current: _Pass) -> int:
        """Note where the computing stream is, and give the point's number."""
        current.points.append(self._backend.moment())
        return len(current.points) - 1

    def begin_call(self, call: Call) -> None:
        """`generate` begins. There may be others under way."""
        call.start = self._backend.moment()

    def end_call(self, call: Call) -> None:
        """It has ended, with a result or without."""
        if self._pass is not None and self._pass.call is call:
            self._finish(self._backend.moment())
        self._count_tokens(call)
        if call.given:
            self._count_first_token(call)
        self.measure_memory()

    def begin_pass(self, work: Workload | None, call: Call | None = None) -> None:
        """A forward pass begins, one of `call` if it is given."""
        start = self._backend.moment()
        if self._pass is not None:
            start = self._finish(start)
        phase = phase_of(work) if call is None else call.phase
        if call is not None:
            start = call.start if call.walks == 1 else start
            self._count_tokens(call)
            if phase == DECODE:
                self._count_first_token(call)
        # Each point is noted once: a device's event is used again once it has been read.
        self._pass = _Pass(work, phase, [start, self._backend.moment()], call)

    def end_pass(self, is_complete: bool) -> None:
        """It has ended. What follows until the next one begins, or the call ends, still counts for it."""
        current = self._pass
        if current is None:
            return
        current.end = self._note(current)
        current.is_complete = is_complete
        for wait in current.waits[-1:]:
            wait.until = current.end if wait.until < 0 else wait.until  # an error has ended it
        for unit in current.units[-1:]:
            unit.end = current.end if unit.end < 0 else unit.end
        if current.call is None:
            self._finish(current.points[current.end])

    def measure_memory(self) -> None:
        """Note what is used by now."""
        self._measured_at = now()
        self._measure(self.profile)

    def forget_spans(self) -> None:
        """What was moved since the last pass was not for a pass."""
        self._pending.clear()

    def _finish(self, end: Moment) -> float:
        """Account for the pass that is over, up to `end`, which is returned in seconds."""
        current, self._pass = self._pass, None
        assert current is not None  # whoever calls has looked
        points = current.points if end is current.points[-1] else [*current.points, end]
        self._backend.wait_computed()
        at = [0.0 if second is None else second for second in self._backend.seconds(points)]
        if current.call is not None and not isinstance(current.call.start, float):
            current.call.start = at[0]
        at[0] = max(at[0], self._finished_at)  # until then, another call's pass was under way
        self._finished_at = at[-1]
        self._backend.start_clock()
        spans = self._take_spans(at[-1])
        self._count(current, at, spans)
        self._keep(current, at, spans)
        return at[-1]

    def _take_spans(self, until: float) -> list[Span]:
        """The spans that have ended by `until`, in seconds. The others stay for the next pass."""
        taken: list[Span] = []
        later: list[Span] = []
        for _ in range(len(self._pending)):
            span = self._pending.popleft()
            start, end = self._backend.seconds((span.start, span.end))
            end = end if start is None or end is None else max(start, end)  # read from two anchors, they may cross
            span = span._replace(start=span.start if start is None else start, end=span.end if end is None else end)
            (later if end is None or end > until else taken).append(span)
        self._pending.extend(later)
        return taken

    def _count(self, current: _Pass, at: Sequence[float], spans: Sequence[Span]) -> None:
        costs = current.costs
        costs.passes, costs.tokens = 1, current.work.tokens if current.work else 0
        moving = [span for span in spans if not _is_computed(span)]
        busy = {link: merge((s.start, s.end) for s in moving if s.kind == link) for link in LINKS}
        costs.io_seconds = self._uncounted("any link", chain.from_iterable(busy.values()))
        for link in LINKS:
            own = [span for span in spans if span.kind == link]
            seconds = self._uncounted(link, ((s.start, s.end) for s in own))
            costs.links[link] = LinkUse(seconds, sum(s.nbytes for s in own))
        for wait, start, end in _stalls(current, at):
            causes = {ROWS: end - start} if wait.is_for_rows else blame(start, end, busy, otherwise=SCHEDULING)
            add_causes(costs.stalls, causes)
            if wait.unit:
                self.profile.layer(wait.unit).waited(causes)
        forward = at[current.end] - at[1]
        costs.wall_seconds = at[-1] - at[0]
        costs.stall_seconds = sum(costs.stalls.values())
        costs.compute_seconds = forward - costs.stall_seconds
        costs.python_seconds = costs.wall_seconds - forward

    def _uncounted(self, what: str, stretches: Iterable[Interval]) -> float:
        """Seconds in which `what` was busy, but for those counted with transfers that ended in the pass before."""
        before, self._counted[what] = self._counted.get(what, []), merge(stretches)
        return total(merge([*before, *self._counted[what]])) - total(before)

    def _keep(self, current: _Pass, at: Sequence[float], spans: Sequence[Span]) -> None:
        profile, began = self.profile, at[0] - self.profile.started
        batch_size = current.work.batch_size if current.work else 0
        profile.add(PassProfile(self._number, current.phase, batch_size, began, current.is_complete, current.costs))
        profile.spans.extend(span._replace(track=COMPUTE) if _is_computed(span) else span for span in spans)
        name = f"{current.phase} pass {self._number}"
        profile.spans.append(Span(COMPUTE, "forward", at[1], at[current.end], name=name))
        for unit in current.units:
            layer = profile.layer(unit.name)
            layer.passes += 1
            layer.compute_seconds += at[unit.end] - at[unit.start]
            profile.spans.append(Span(COMPUTE, COMPUTE, at[unit.start], at[unit.end], name=unit.name))
        for wait, start, end in _stalls(current, at):
            profile.spans.append(Span(COMPUTE, STALL, start, end, name=wait.unit or ROWS))
        for since, until in ((at[0], at[1]), (at[current.end], at[-1])):
            if until > since:
                profile.spans.append(Span(PYTHON, PYTHON, since, until, name="sampling and Python"))
        if not profile.memory or at[-1] - self._measured_at > MEMORY_SECONDS:
            self.measure_memory()
        self._number += 1
        if current.call is not None and current.phase == PREFILL:
            current.call.prefill_end = at[-1] if current.is_complete else None

    def _count_tokens(self, call: Call) -> None:
        """Count what the steps of `call` have given since this was asked last, by the thread that generates."""
        given, decoded = call.counted
        call.counted = call.given, call.decoded
        self.profile.new_tokens += call.given - given
        self.profile.decoded_tokens += call.decoded - decoded

    def _count_first_token(self, call: Call) -> None:
        """The prompt is over: its last pass has given the first token."""
        if call.prefill_end is not None:
            self.profile.ttft_seconds.append(call.prefill_end - call.start)
            call.prefill_end = None


def _stalls(current: _Pass, at: Sequence[float]) -> Iterator[tuple[_Wait, float, float]]:
    """The waits that took time, with when they began and ended."""
    for wait in current.waits:
        start, end = max(wait.since, at[wait.after]), at[wait.until]
        if end > start:
            yield wait, start, end


def _is_computed(span: Span) -> bool:
    """Whether the computing thread or stream itself was at work, and not a reader thread or a copy stream."""
    return not span.track.startswith("reader-") and not span.track.endswith(" stream")
