"""The generations under way take turns between passes. This knows what memory each holds, and who waits for whom.

Each is begun only if its KV cache, up to its end, fits beside those of the others; else it waits for one of them to
end. What would wait for itself is refused: a call from inside another generation that has to end first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Protocol

from torch import nn

from airstream.compat.kept_state import kept_state
from airstream.errors import AirstreamError, BudgetError, UnsupportedError
from airstream.model.gate import Gate
from airstream.plan.request import Workload
from airstream.reporting.units import counted, format_bytes
from airstream.system.frames import holder, is_on_stack
from airstream.system.waiting import Waiting

LOOK_SECONDS = 0.5
"""How often a call that waits looks whether the generations that it waits for are still there."""

PATIENCE_SECONDS = 30.0
"""How long a call waits for generations that make no pass: they may be waiting for it."""


class Room(Protocol):
    """This knows how much fits."""

    def has_room(self, work: Workload) -> bool:
        """Whether KV caches and activations of `work` fit."""

    def kv_bytes(self, work: Workload) -> int:
        """The bytes of the KV caches of `work`."""


@dataclass(slots=True, eq=False)
class Generation:
    """One call of `generate`.

    Attributes:
        frame: the call: an interrupt may keep it from saying that it is over.
        kv_bytes: the bytes of its KV cache at its end, as far as that is known.
        has_cache: its passes are given a KV cache.
        is_waiting: it waits for another one to end.
    """

    thread: int
    frame: FrameType
    kv_bytes: int
    has_cache: bool = False
    is_waiting: bool = False


class Generations:
    """The generations of one model that are under way.

    Args:
        gate: the way into the model.
        room: asked while the turn is held.
        modules: the modules of the model.
    """

    def __init__(self, gate: Gate, room: Room, modules: Iterable[nn.Module]) -> None:
        self._gate = gate
        self._room = room
        self._modules = modules
        self._kept_state: str | None = ""  # not looked for yet
        self._all: list[Generation] = []
        self._ended = Waiting()
        self._num_passes = 0

    @property
    def threads(self) -> set[int]:
        """The threads that generate, but for the calling one."""
        return {one.thread for one in self._under_way()} - {threading.get_ident()}

    def _under_way(self) -> list[Generation]:
        for one in tuple(self._all):
            if not is_on_stack(one.frame, one.thread) and one in self._all:
                self._all.remove(one)
        return list(self._all)

    def after_fork(self) -> None:
        """In a forked child: those that were under way are the parent's."""
        self._all = []
        self._ended = Waiting()

    @contextmanager
    def one(self, work: Workload | None, begin: Callable[[Workload | None], None]) -> Iterator[None]:
        """Around a generation that asks for `work` at its end. Waits until it fits.

        Args:
            begin: called with the turn held, and with what is beside it in `work`.
        """
        mine, frame = None, holder()
        try:
            with self._once_possible(None, work) as beside:
                begin(beside)
                # Nothing is set aside for one that does not fit at all, which may end early.
                fits = work is not None and self._room.has_room(work)
                mine = Generation(threading.get_ident(), frame, self._room.kv_bytes(work) if fits and work else 0)
                self._all.append(mine)
            yield
        finally:
            if mine in self._all:
                self._all.remove(mine)
            self.wake()

    @contextmanager
    def one_pass(self, work: Workload | None, has_cache: bool) -> Iterator[Workload | None]:
        """Around a pass, with the turn. Gives `work` with what is beside it. Waits until it fits."""
        mine = self._mine(work, has_cache)
        with self._once_possible(mine, work) as beside:
            if mine is not None and work is not None:
                mine.kv_bytes = max(mine.kv_bytes, self._room.kv_bytes(work))
            self._num_passes += 1
            yield beside

    @contextmanager
    def between(self) -> Iterator[None]:
        """With the turn, while no other thread generates: around what changes the results of the model."""
        while True:
            with self._gate.inside():
                others = [one for one in self._under_way() if one.thread != threading.get_ident()]
                if not others:
                    yield
                    return
            self._wait(None, others, UnsupportedError("an adapter cannot change while a generation uses the model"))

    def wake(self) -> None:
        """Let those who wait look again: something has changed."""
        with self._ended.lock:
            self._ended.call()

    def _mine(self, work: Workload | None, has_cache: bool) -> Generation | None:
        """The generation that a pass of the calling thread belongs to, if it is not a call from inside of it."""
        mine = next((one for one in reversed(self._under_way()) if one.thread == threading.get_ident()), None)
        if mine is not None and work is not None:
            if mine.has_cache and not has_cache:
                return None
            mine.has_cache |= has_cache
        return mine

    @contextmanager
    def _once_possible(self, mine: Generation | None, work: Workload | None) -> Iterator[Workload | None]:
        while True:
            with self._gate.inside():
                others = [one for one in self._under_way() if one is not mine]
                nbytes = sum(one.kv_bytes for one in others)
                elsewhere = any(one.thread != threading.get_ident() for one in others)
                obstacle = self._in_the_way(work, nbytes, elsewhere) if others else None
                if obstacle is None:
                    yield replace(work, beside_bytes=nbytes) if work is not None else None
                    return
                is_inside = any(one.thread == threading.get_ident() for one in others) or self._gate.turns.depth > 1
                if is_inside or all(one.is_waiting for one in others):
                    raise obstacle
                if mine is not None:
                    mine.is_waiting = True
            self._wait(mine, others, obstacle)

    def _in_the_way(self, work: Workload | None, beside_bytes: int, of_other_threads: bool) -> AirstreamError | None:
        """Why `work` cannot be done while other generations, with KV caches of so many bytes, are under way."""
        if self._kept_state == "":
            self._kept_state = kept_state(self._modules)
        if of_other_threads and self._kept_state is not None:
            return UnsupportedError(
                f"this model keeps something of a generation in itself ({self._kept_state}): it is called from inside "
                "of one, by another thread, which would change that. Call it when that has ended, or load it twice"
            )
        if work is None:
            return None
        together = replace(work, beside_bytes=beside_bytes)
        if self._room.has_room(together) or not self._room.has_room(work):  # the latter is refused, or ends early
            return None
        need = self._room.kv_bytes(together)
        return BudgetError(
            f"{work.batch_size} x {counted(work.context, 'token')} need a KV cache of "
            f"{format_bytes(need - beside_bytes)} beside {format_bytes(beside_bytes)} of generations under way that "
            "cannot end before this call: too much for max_memory. Raise it, generate fewer tokens, or call the model "
            "when they have ended"
        )

    def _wait(self, mine: Generation | None, others: list[Generation], obstacle: AirstreamError) -> None:
        """Until one of the `others` has ended, or the model is closed."""
        try:
            seen, patient_until = self._num_passes, time.monotonic() + PATIENCE_SECONDS
            while (ticket := self._ticket(others)) is not None:
                if self._ended.wait(ticket, min(LOOK_SECONDS, PATIENCE_SECONDS)):
                    return  # and look again
                if time.monotonic() < patient_until:
                    continue
                if seen == self._num_passes and not self._gate.turns.is_taken:
                    raise obstacle
                seen, patient_until = self._num_passes, time.monotonic() + PATIENCE_SECONDS
        finally:
            if mine is not None:
                mine.is_waiting = False

    def _ticket(self, others: list[Generation]) -> threading.Lock | None:
        """To wait with, while all of the `others` are under way."""
        with self._ended.lock:
            under_way = self._under_way()
            return self._ended.ticket() if all(one in under_way for one in others) else None
