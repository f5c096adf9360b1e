"""A thread that tests wait for, and that keeps what became of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
