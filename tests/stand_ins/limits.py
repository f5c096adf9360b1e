"""What refusing a hostile file may cost, measured so that a busy machine makes no difference."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

MAX_BYTES = 100 << 20
MAX_SECONDS = 1.0
GENEROUS = 10
"""Tracing memory takes a multiple of the time, and processors differ."""


@contextmanager
def limited(max_bytes: int = MAX_BYTES) -> Iterator[None]:
    """What runs inside takes no more memory than `max_bytes`, and no more time of this thread than it may."""
    tracemalloc.start()
    started = time.thread_time()
    try:
        yield
    finally:
        seconds = time.thread_time() - started
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < max_bytes, f"{peak:,} bytes"
    assert seconds < MAX_SECONDS * GENEROUS, f"{seconds:.1f} s of CPU time"


def fail_from_within(error: BaseException) -> NoReturn:
    """Raise `error` as a call into the system, torch or a driver does: by no `raise` statement."""
    (None for _ in ()).throw(error)
    raise AssertionError("the line above raises")
