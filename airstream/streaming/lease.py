"""A lease keeps a layer batch in memory for as long as somebody holds it.

It knows one region of the ring, and whom to tell that it is over. It refuses to know who else holds that region.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from airstream.streaming.region import Region


class Lease:
    """The memory of a layer batch, filled, until `end` or the end of a `with`. Whoever holds it may be any thread.

    Attributes:
        region: where the batch is.
        thread: the thread that took the lease.
    """

    __slots__ = ("_on_end", "region", "thread")

    def __init__(self, region: Region, on_end: Callable[[Lease], None]) -> None:
        self.region = region
        self.thread = threading.get_ident()
        self._on_end: Callable[[Lease], None] | None = on_end

    def end(self) -> None:
        """The last computation with the batch has been submitted: its place may be reused. Idempotent, blocks not."""
        if self._on_end is not None:
            self._on_end(self)

    def forget(self) -> None:
        """It has been ended. Only then does this forget whom to tell, for an interrupt may come before."""
        self._on_end = None

    def __enter__(self) -> Region:
        return self.region

    def __exit__(self, *_: object) -> None:
        self.end()
