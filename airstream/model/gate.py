"""The gate is the way into a model: one thread at a time, while it is open, in the process that it works in.

It knows when to let in, and what has to be done on the way out. It refuses to know what is done inside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from airstream.errors import CLOSED, FORGOTTEN, ClosedError
from airstream.model.asking import Asking
from airstream.model.turns import Turns
from airstream.system.closing import Closing
from airstream.system.forks import Forks
from airstream.system.waiting import Waiting

REST_SECONDS = 5.0
"""How long the end of a process waits for threads that generate."""


class Gate:
    """Whoever uses the model is inside while they do.

    Args:
        ready: called whenever somebody comes in.
        let_go: called at the beginning and at the end of the outermost use.
        after_fork: called in a forked child before anybody comes in; raises if the model does not work there.

    Attributes:
        asking: what the weights are told while somebody is inside.
        closing: what is given back when the gate has closed and nobody is inside.
        is_computing: the thread that is inside calls modules of the model. Whoever does that sets it, and sets it back
            in a `finally` that calls nothing: no interrupt comes between, as it may at the end of a `with`.
    """

    def __init__(self, ready: Callable[[], None], let_go: Callable[[], None], after_fork: Callable[[], None]) -> None:
        self.turns = Turns()
        self.asking = Asking()
        self.closing = Closing()
        self.is_computing = False
        self._ready = ready
        self._let_go = let_go
        self._after_fork = after_fork
        self._forks = Forks()
        self._closed = False
        self._is_abandoned = self._is_forgotten = False
        self._resting: set[int] = set()
        self._rested = Waiting()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around every use of the model. Blocks until it is this thread's turn. No autograd."""
        self._forks.restart_in_child(self._after_fork)
        try:
            with self.turns.hold() as turn, self._leaving(turn), torch.no_grad(), self._asking(turn):
                self.check_open()
                self._ready()
                yield
        except ClosedError:
            self._rest_if_abandoned()
            raise

    def enter(self, is_at_work: Callable[[int], bool]) -> None:
        """Come in where no `with` can be, in the hook of a module. `leave` goes out again, also after an error.

        Args:
            is_at_work: whether the thread, given by number, still is where it came in.
        """
        self._forks.restart_in_child(self._after_fork)
        self.turns.enter(is_at_work)
        if self._closed:
            self.leave()
        self.check_open()

    def leave(self) -> None:
        """Go out where `enter` came in."""
        if self._closed and self.turns.depth == 1:
            self.closing.close()
        self.turns.leave()
        if self._closed:
            self._rest_if_abandoned()

    def check_open(self) -> None:
        """Raise ClosedError if it is closed."""
        if self._closed:
            self._rest_if_abandoned()
            raise ClosedError(FORGOTTEN if self._is_forgotten else CLOSED)

    def shut(self, is_abandoned: bool = False) -> None:
        """Let nobody in from now on. `finish_closing` does the rest.

        Args:
            is_abandoned: no thread will look at what its call raises.
        """
        self._is_forgotten |= is_abandoned and not self._closed
        self._closed = True
        self._is_abandoned |= is_abandoned
        if self._forks.is_child:
            self.turns.after_fork()

    def finish_closing(self) -> None:
        """Wait until nobody is inside, and give everything back; if the caller is inside, when it comes out."""
        with self.turns.hold() as turn, self._leaving(turn):
            pass

    def wait_for_rest(self, threads: Collection[int]) -> None:
        """Wait until `threads`, which generate, have come to rest: torch aborts a process that ends while they compute.

        Not for long: one may be in somebody else's code, and stay there.
        """
        self._rested.until(lambda: self._resting.issuperset(threads), REST_SECONDS)

    def _rest_if_abandoned(self) -> None:
        """The interpreter ends, and its daemon threads with it: there is nobody to be told that the model is closed."""
        if self._is_abandoned and threading.current_thread().daemon and not self.turns.is_mine:
            with self._rested.lock:
                self._resting.add(threading.get_ident())
                self._rested.call()
            self._rested.wait(Waiting().ticket())  # for ever

    @contextmanager
    def _leaving(self, turn: int) -> Iterator[None]:
        is_outermost = self.turns.depth == 1
        if is_outermost:
            self._let_go()  # an interrupt may have kept an earlier turn from it
        try:
            yield
        finally:
            if is_outermost and self.turns.is_now(turn):
                self._let_go()
                if self._closed:
                    self.closing.close()

    @contextmanager
    def _asking(self, turn: int) -> Iterator[None]:
        """While nobody computes a gradient; then as before, or not at all if this is the outermost use."""
        was_on, is_outermost = self.asking.turn(True), self.turns.depth == 1
        try:
            yield
        finally:
            if self.turns.is_now(turn):
                self.asking.turn(was_on and not is_outermost)
