"""A thread that tests wait for, and that keeps what became of it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any


class InThread(threading.Thread):
    """Runs a function and keeps what it returns or raises."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error

    def finish(self, seconds: float = 30) -> InThread:
        """Itself, when it has ended. It fails the test if that takes longer."""
        self.join(timeout=seconds)
        assert not self.is_alive(), "the thread hangs"
        return self


def is_running(code: CodeType, thread: int) -> bool:
    """Whether `thread` is somewhere inside of `code`."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
