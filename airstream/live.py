"""One line about a generation while it runs: tokens, seconds per token, how fast weights come, memory.

Knows what to show. Where it is shown is up to whoever owns the screen.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from airstream.model.observer import Observer
from airstream.probe import DISK, H2D, HOST_MEMORY, now
from airstream.stats import StreamStats
from airstream.units import format_bytes, format_rate, format_seconds

BAR = "{percentage:3.0f}%|{bar:20}| {desc}"

RECENT_PASSES = 8
"""Passes whose mean is shown."""


class LiveLine:
    """Follows the passes that `observer` reports. Each gives one token, but for a prompt that takes several passes.

    Args:
        stats: gives what has been streamed so far.
        show: called with the line after every pass.
    """

    def __init__(self, observer: Observer, stats: StreamStats, show: Callable[[int, str], None]) -> None:
        self._observer = observer
        self._stats = stats
        self._show = show
        self._tokens = 0
        self._history: deque[tuple[float, int, int]] = deque(maxlen=RECENT_PASSES + 1)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Show the line for as long as this lasts."""
        self._note()
        self._observer.watchers.append(self._tick)
        try:
            yield
        finally:
            self._observer.watchers.remove(self._tick)

    def _tick(self) -> None:
        self._tokens += 1
        if self._tokens == 2:
            self._history.popleft()  # the prompt's pass says little about the ones that follow
        self._note()
        self._show(self._tokens, self.text())

    def _note(self) -> None:
        self._history.append((now(), self._stats.streamed_bytes, self._stats.host_bytes))

    def text(self) -> str:
        """`"12 tokens, 1.66 s/token, 2.21 GB/s from disk (96 %), 2.93 GiB"`."""
        (start, *before), (end, *after) = self._history[0], self._history[-1]
        seconds = (end - start) / max(1, len(self._history) - 1)
        parts = [f"{self._tokens} token{'s' * (self._tokens > 1)}", f"{format_seconds(seconds)}/token"]
        for source, limited_by, old, new in zip(
            (self._stats.source, HOST_MEMORY), (DISK, H2D), before, after, strict=True
        ):
            if new > old:
                rate = (new - old) / max(end - start, 1e-9)
                limit = self._observer.rates.get(limited_by)  # of the disk there is none for what the page cache gives
                share = f" ({rate / limit.per_second:.0%})" if limit else ""
                parts.append(f"{format_rate(rate)} from {source}{share}")
        parts.append(format_bytes(self._observer.used_bytes()))
        return ", ".join(parts)


@contextmanager
def progress_bar(observer: Observer, stats: StreamStats, max_tokens: int | None) -> Iterator[None]:
    """The line as a progress bar: in a notebook's output, or on standard error."""
    from tqdm import tqdm

    out: Any = sys.stdout if in_notebook() else sys.stderr
    with tqdm(total=max_tokens, file=out, unit=" tokens", bar_format=BAR) as bar:

        def show(tokens: int, text: str) -> None:
            bar.set_description_str(text, refresh=False)
            bar.update(1 if not max_tokens or tokens <= max_tokens else 0)

        with LiveLine(observer, stats, show).following():
            yield


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and shell.__class__.__name__ in ("ZMQInteractiveShell", "Shell")  # the latter is Colab's
