"""What a long life has taken is given back here, the latest first. An interrupt loses none of it, as with an
ExitStack it would.

It knows in which order. It refuses to know what is given back: functions that may be called a second time.
"""

from __future__ import annotations

from collections.abc import Callable


class Closing:
    """What is to be done at the end."""

    def __init__(self) -> None:
        self._left: list[Callable[[], object]] = []

    def callback(self, give_back: Callable[[], object]) -> None:
        """Have `give_back` called by `close`; again, if an interrupt comes while it is."""
        self._left.append(give_back)

    def close(self) -> None:
        """Do all that is left to do. What fails is done with, and raises its error when the rest has been done."""
        failed: Exception | None = None
        while self._left:
            try:
                self._left[-1]()
            except Exception as error:
                failed = failed or error
            self._left.pop()
        if failed is not None:
            raise failed
