"""Ctrl-C at a chosen step, as Python itself delivers it: where it looks for signals, and nowhere else.

What raised an exception from within a trace function would raise it between any two instructions, inside of steps which
nothing interrupts in earnest, such as the end of a `with` of a plain lock. So the signal is sent from C, without an
instruction of Python's, which would notice it there and then.
"""

from __future__ import annotations

import _thread
import contextlib
import dis
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import airstream

_Place = tuple[CodeType, int]

_LOOKS_FOR_SIGNALS = ("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
"""After which instructions Python does."""


class _Signal(int):
    send = property(_thread.interrupt_main)


_CTRL_C = _Signal(signal.SIGINT)


class Interrupts:
    """Interrupts of `call`, one at each of `most` places in airstream, and in the parts of Python that it is made of.

    Chosen by chance, but always alike. The places are those that are passed when `call` is made once.
    """

    def __init__(self, call: Callable[[], Any], most: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        self._call = call
        seen: Counter[_Place] = Counter()
        self._traced(seen.update)
        chance = random.Random(1)
        places = sorted(seen, key=lambda place: (place[0].co_filename, place[0].co_firstlineno, place[1]))
        self.places = [(place, chance.randint(1, seen[place])) for place in chance.sample(places, min(most, len(seen)))]

    def at(self, place: _Place, count: int) -> bool:
        """Make the call, and interrupt it when it is at `place` for the time `count`. Whether it got there."""
        left = count

        def step(steps: Collection[_Place]) -> bool:
            nonlocal left
            left -= place in steps
            return not left

        with contextlib.suppress(KeyboardInterrupt):
            self._traced(step)
            return False
        return True

    def _traced(self, step: Callable[[Collection[_Place]], bool | None]) -> None:
        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if event == "call":
                if not _is_of_interest(frame.f_code):
                    return None
                frame.f_trace_opcodes, frame.f_trace_lines = True, False
            elif event == "opcode" and frame.f_lasti in _places(frame.f_code) and step([(frame.f_code, frame.f_lasti)]):
                sys.settrace(None)
                _CTRL_C.send  # noqa: B018 - an attribute, for that is no call which Python would notice it after
                return None
            return trace

        sys.settrace(trace)
        try:
            self._call()
        finally:
            sys.settrace(None)


def _is_of_interest(code: CodeType) -> bool:
    file = Path(code.co_filename)
    return file.is_relative_to(Path(airstream.__file__).parent) or file.name in ("threading.py", "contextlib.py")


def _places(code: CodeType) -> frozenset[int]:
    if code not in _PLACES:
        steps = dis.get_instructions(code)
        _PLACES[code] = frozenset(each.offset for each in steps if each.opname.startswith(_LOOKS_FOR_SIGNALS))
    return _PLACES[code]


_PLACES: dict[CodeType, frozenset[int]] = {}
