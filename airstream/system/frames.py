"""This says which threads run, and whether a call is still under way, which an interrupt may keep from giving back.

It knows frames of the interpreter. It refuses to know what is called.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
from types import FrameType

_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def holder() -> FrameType:
    """The call in whose `with` statement the caller is entered.

    What is on the way there is skipped: generators, of which context managers are made, and what drives these.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_on_the_way(frame):
        frame = frame.f_back
    return frame


def _is_on_the_way(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & _SUSPENDS) or frame.f_globals.get("__name__") == "contextlib"


def running() -> dict[int, FrameType]:
    """The innermost call of every thread of Python, by the number of the thread.

    Before 3.12 the interpreter holds a lock while it makes the answer, which the garbage collector may want, too, and
    wait for it for ever: so that is to have nothing to do then.
    """
    if sys.version_info < (3, 12) and gc.isenabled():
        gc.collect(0)
    return sys._current_frames()


def is_on_stack(wanted: FrameType, thread: int) -> bool:
    """Whether `thread` has not left the call whose frame is `wanted`. The thread may run meanwhile."""
    while True:
        frame = last = sys._getframe() if thread == threading.get_ident() else running().get(thread)
        while frame is not None and frame is not wanted:
            frame, last = frame.f_back, frame
        if frame is not None or last is None or not last.f_code.co_flags & _SUSPENDS:
            return frame is not None
        # What has been suspended while it was looked at has no caller any more: look again.
