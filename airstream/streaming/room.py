"""This waits for room in the ring that threads hold, and notices when none of them could ever give it back.

It knows threads and what they hold. It refuses to know what passes through the ring, and where in it that lies.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

from airstream.errors import BudgetError
from airstream.reporting.units import format_bytes
from airstream.system.frames import running
from airstream.system.waiting import FOREVER, Waiting


class RoomChanged(Waiting):
    """Who waits for a change, in threads some of which want room that others hold."""

    def __init__(self) -> None:
        super().__init__()
        self._in_vain: set[int] = set()  # the threads that have looked for room since anything has changed

    def call(self) -> None:
        """Something has changed: who found no room has to look again."""
        self._in_vain.clear()
        super().call()

    def is_hopeless(self, holders: Collection[int]) -> bool:
        """Whether nothing can change while the threads `holders` have all the room that this one wants.

        Each of them that still runs waits for room itself. If not, this thread is going to wait. The lock is held.
        """
        thread = threading.get_ident()
        self._in_vain.add(thread)
        if not self._in_vain.issuperset(running().keys() & holders):
            return False
        self._in_vain.discard(thread)
        return True

    def wait(self, ticket: threading.Lock, seconds: float = FOREVER) -> bool:
        """As any wait. Who is interrupted waits no longer."""
        try:
            return super().wait(ticket, seconds)
        finally:
            self._in_vain.discard(threading.get_ident())


def no_room(batch: int, nbytes: int, ring_bytes: int, held: Mapping[int, int]) -> BudgetError:
    """`batch` needs `nbytes`, and nobody is going to give back the batches that are `held`, by number, in bytes."""
    taken = ", ".join(f"batch {number} ({format_bytes(size)})" for number, size in held.items())
    return BudgetError(
        f"layer batch {batch} needs {format_bytes(nbytes)} of a ring of {format_bytes(ring_bytes)}, in which leases "
        f"that nobody is going to end hold {taken or 'nothing'}: end one before asking for another, or raise max_memory"
    )
