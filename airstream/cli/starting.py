"""A command starts by importing torch and transformers: it says so, and Ctrl-C ends the process at once meanwhile.

Their modules try whether others are there, and take an interrupt for an answer: they go on without, or fail much later
with an error that names something else. Nothing has been begun by then that would have to be ended in order.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from airstream.reporting.status import Activity, showing
from airstream.system.importing import quiet_imports

INTERRUPTED = 130
"""The exit status, as shells have it for what SIGINT has ended."""


@contextmanager
def starting() -> Iterator[None]:
    """Around the imports of a command."""
    with (
        showing(Activity("starting: importing torch and transformers").text) as line,
        quiet_imports(),
        ending_at_once(line.erase if line is not None else lambda: None),
    ):
        yield


@contextmanager
def ending_at_once(tidy: Callable[[], None]) -> Iterator[None]:
    """While this lasts, Ctrl-C calls `tidy` and ends the process, unless somebody else has said what it does."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(*_: object) -> NoReturn:
        tidy()
        print(file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
