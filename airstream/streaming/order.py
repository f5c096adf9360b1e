"""This predicts in which order the layers will be asked for, from the order in which they were.

Most models visit every layer once per pass, always in the same order. Some call layers several times, skip a vision
tower on text, or run an encoder once and a decoder per token. All of them repeat themselves, so the prediction is what
followed the last time, found by a cursor that walks the history a period behind.

It knows numbers of batches. It refuses to know what is in them, and which of them are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable


class AccessOrder:
    """Predicts the next batches from those observed. It starts with the order in which the model lists them."""

    def __init__(self, batches: Iterable[int]) -> None:
        self._history = list(batches)
        self._cursor = 0
        self._listed = len(self._history)  # never forgotten: what has not been asked for in a long time may come back
        # Long enough for the longest period there is (a recurrent model's passes over a few layers), several times.
        self._limit = self._listed + max(4096, 8 * self._listed)

    def observe(self, batch: int) -> bool:
        """`batch` is being asked for. Returns whether that had been predicted."""
        predicted = self._history[self._cursor] == batch
        if not predicted:
            self._cursor = self._last_seen(batch)
        self._history.append(batch)
        self._cursor += 1
        if len(self._history) > self._limit:
            self._forget()
        return predicted

    def upcoming(self, count: int | None = None) -> list[int]:
        """The next `count` different batches, nearest first; all that are known if `count` is None."""
        return list(dict.fromkeys(self._history[self._cursor :]))[:count]

    def _last_seen(self, batch: int) -> int:
        """Where `batch` was asked for last, preferably after the same predecessor as now."""
        history, previous = self._history, self._history[-1]
        places = [place for place in range(len(history) - 1, -1, -1) if history[place] == batch]
        return next((place for place in places if place and history[place - 1] == previous), places[0])

    def _forget(self) -> None:
        """Drop the older half of what was observed."""
        kept_from = self._listed + (len(self._history) - self._listed) // 2
        cursor, self._cursor = self._cursor, 0  # which is a place in it, also if an interrupt comes now
        del self._history[self._listed : kept_from]
        if cursor >= kept_from:
            cursor -= kept_from - self._listed
        elif cursor >= self._listed:  # the period is longer than what is kept: start over from here
            latest = self._history.pop()
            cursor = self._last_seen(latest) + 1
            self._history.append(latest)
        self._cursor = cursor
