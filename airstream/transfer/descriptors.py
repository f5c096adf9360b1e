"""This bounds the number of open files: systems allow 256 in all, and checkpoints come in hundreds of shards.

It knows descriptors, who uses them, and which was used longest ago. It refuses to know how a file is opened and read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import Protocol

MAX_OPEN_FILES = 64
"""One reader has at most so many open. Of more shards, each is opened again once a pass, which costs microseconds."""


class Opens(Protocol):
    """A file that can be opened, and opened again after that has been closed."""

    def open_descriptor(self) -> int:
        """A new descriptor of it; whoever asks closes it."""


@dataclass(slots=True)
class _Open:
    file: FileIO  # which is closed in one step, and may be again: an interrupt may come before that is noted
    num_users: int = 0


class Descriptors:
    """Keeps at most `limit` files open, and one more for each thread while all of them are in use.

    What nobody uses, and was used longest ago, is closed for another file. All methods may be called from any thread.
    """

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._files: dict[Opens, _Open] = {}  # used longest ago first

    @contextmanager
    def of(self, file: Opens) -> Iterator[int]:
        """The descriptor of `file`, open for as long as this lasts. Raises what opening it raises."""
        with self._lock:
            entry = self._files.pop(file, None)
            if entry is None:
                self._make_room()
                entry = _Open(FileIO(file.open_descriptor()))
            self._files[file] = entry
            entry.num_users += 1
        try:
            yield entry.file.fileno()
        finally:
            with self._lock:
                entry.num_users -= 1

    def close(self, file: Opens) -> None:
        """Close `file`, if it is open. Nobody may be using it."""
        with self._lock:
            if file in self._files:
                self._close(file)

    def _make_room(self) -> None:
        idle = [file for file, entry in self._files.items() if not entry.num_users]
        for file in idle[: max(0, len(self._files) + 1 - self._limit)]:
            self._close(file)

    def _close(self, file: Opens) -> None:
        self._files[file].file.close()
        del self._files[file]
