"""This waits for room in the ring that threads hold, and notices when none of them could ever give it back.

It knows threads and what they hold. It refuses to know what passes through the ring, and where in it that lies.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Mapping

from airstream.errors import BudgetError
from airstream.reporting.units import format_bytes


class RoomChanged(threading.Condition):
    """The condition that something has changed, for threads some of which want room that others hold."""

    def __init__(self) -> None:
        super().__init__()
        self._in_vain: set[int] = set()  # the threads that have looked for room since anything has changed

    def notify_all(self) -> None:
        """Something has changed: who found no room has to look again."""
        self._in_vain.clear()
        super().notify_all()

    def wait_for_room(self, holders: Collection[int]) -> bool:
        """Block until something changes, while the threads `holders` have all the room.

        Returns:
            False, at once, if nothing could: each of them that still runs waits for room itself.
        """
        thread = threading.get_ident()
        self._in_vain.add(thread)
        try:
            if self._in_vain.issuperset(sys._current_frames().keys() & holders):
                return False
            self.wait()
            return True
        finally:
            self._in_vain.discard(thread)


def no_room(batch: int, nbytes: int, ring_bytes: int, held: Mapping[int, int]) -> BudgetError:
    """`batch` needs `nbytes`, and nobody is going to give back the batches that are `held`, by number, in bytes."""
    taken = ", ".join(f"batch {number} ({format_bytes(size)})" for number, size in held.items())
    return BudgetError(
        f"layer batch {batch} needs {format_bytes(nbytes)} of a ring of {format_bytes(ring_bytes)}, in which leases "
        f"that nobody is going to end hold {taken or 'nothing'}: end one before asking for another, or raise max_memory"
    )
