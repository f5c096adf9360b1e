"""Host memory is pinned behind everybody's back: on a thread of its own, one buffer after the other.

Pinning touches every page of a buffer, and takes about as long as a copy of it. Until it is done, copies go another
way. It knows buffers and who is to be pinned next. It refuses to know what is in them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.runtime import Runtime

logger = logging.getLogger(__name__)


class Pinning:
    """Whether `buffer` is pinned.

    Attributes:
        is_pinned: turns True, in the middle of things, when it is.
    """

    def __init__(self, runtime: Runtime, buffer: HostBuffer) -> None:
        self.is_pinned = False
        self._runtime = runtime
        self._buffer: HostBuffer | None = buffer
        self._lock = threading.Lock()

    def pin(self) -> bool:
        """Pin it, unless that has been undone already. Blocks. False if the system refuses."""
        with self._lock:
            if self._buffer is None:
                return True
            self.is_pinned = self._runtime.pin(self._buffer)
            return self.is_pinned

    def undo(self) -> None:
        """Let go of it, unpinned, for good. Idempotent; blocks while it is being pinned."""
        with self._lock:
            if self._buffer is not None and self.is_pinned:
                self._runtime.unpin(self._buffer)
            self._buffer, self.is_pinned = None, False


class Pinner:
    """Pins what is submitted, in that order. Its thread lives while there is something to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[Pinning] = deque()
        self._thread: threading.Thread | None = None
        self._has_warned = False

    def submit(self, pinning: Pinning) -> None:
        """Have it pinned some time soon. Does not block."""
        with self._lock:
            self._queue.append(pinning)
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="airstream-pinning", daemon=True)
                thread.start()  # and waits for the lock; who was interrupted here has no thread to be joined
                self._thread = thread

    def is_worker(self, thread: threading.Thread) -> bool:
        """Whether `thread` is the one that pins."""
        return thread is self._thread

    def wait(self) -> None:
        """Block until all that has been submitted is pinned."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """Leave the rest as it is. Idempotent; blocks while something is being pinned."""
        with self._lock:
            self._queue.clear()
        self.wait()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                pinning = self._queue.popleft()
            if not pinning.pin() and not self._has_warned:
                self._has_warned = True
                logger.warning("host memory for weights could not be pinned: copies take a detour, and are slower")
            del pinning  # it refers to memory, which may be given back while this thread goes on
