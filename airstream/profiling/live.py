"""This makes one line about a generation while it runs: the prompt, then tokens, seconds per token, speed, memory.

It knows what to show, and where a call from Python shows it. A command line owns its screen: it draws the line itself.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from airstream.plan.step import Step
from airstream.profiling.observer import Observer
from airstream.reporting.notebook import in_notebook
from airstream.reporting.probe import DISK, H2D, HOST_MEMORY, now
from airstream.reporting.stats import StreamStats
from airstream.reporting.status import bar, can_draw, repeating, showing
from airstream.reporting.units import counted, format_bytes, format_rate, format_seconds

TQDM_FORMAT = "{percentage:3.0f}%|{bar:20}| {desc}"

RECENT_STEPS = 8
"""Steps whose mean is shown."""

SLOW_SECONDS = 2.0
"""A token that takes longer shows its layers, too."""

Progress = bool | Literal["auto"]


class LiveLine:
    """Follows the steps of one thread.

    Args:
        stats: gives what has been streamed and computed so far.
        on_step: called after every step that gave a token.
        max_tokens: the most that the call may give, if that is known.

    Attributes:
        tokens: what each sequence has been given.
    """

    def __init__(
        self,
        observer: Observer,
        stats: StreamStats,
        on_step: Callable[[], None] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.tokens = 0
        self._observer = observer
        self._stats = stats
        self._on_step = on_step
        self._max_tokens = max_tokens
        self._layers_before = 0
        self._history: deque[tuple[float, int, int, int]] = deque(maxlen=RECENT_STEPS + 1)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow what the calling thread generates for as long as this lasts."""
        self._thread = threading.get_ident()
        self._layers_before = self._stats.layers
        self._note()
        self._observer.watchers.append(self._tick)
        try:
            yield
        finally:
            self._observer.watchers.remove(self._tick)

    def _tick(self, step: Step) -> None:
        if self._thread != threading.get_ident():
            return
        self._layers_before = self._stats.layers
        if not step.accepted:
            return
        if self.tokens and not self._history[0][1]:
            self._history.popleft()  # the prompt's step says little about the ones that follow
        self.tokens += step.accepted
        self._note()
        if self._on_step is not None:
            self._on_step()

    def _note(self) -> None:
        self._history.append((now(), self.tokens, self._stats.streamed_bytes, self._stats.host_bytes))

    def text(self) -> str:
        """What is to be shown now. May be asked for by any thread."""
        return self._about_tokens() if self.tokens else self._about_prompt()

    def _about_prompt(self) -> str:
        """`"reading the prompt [###.................] layer 12 of 80, 1.9 GB/s, about 40 s"`."""
        start, _, bytes_before, _ = self._history[0]
        seconds = now() - start
        layer, layers = self._layer()
        parts = [f"reading the prompt {bar(max(layer - 1, 0) / layers)} layer {layer} of {layers}"]
        if nbytes := self._stats.streamed_bytes - bytes_before:
            parts.append(format_rate(nbytes / max(seconds, 1e-9)))
        if layer > 1 and seconds > 1:
            left = round(seconds / (layer - 1) * (layers - layer + 1))
            parts.append(f"about {f'{left} s' if left < 100 else format_seconds(left)} more")
        return ", ".join(parts)

    def _layer(self) -> tuple[int, int]:
        """The layer that computes, counted from 1 (0 before the first one), and how many there are."""
        layers = max(self._observer.num_layers(), 1)
        return min(self._stats.layers - self._layers_before, layers), layers

    def _about_tokens(self) -> str:
        """`"12 tokens, 1.66 s/token, 2.21 GB/s from disk (96 %), 2.93 GiB"`."""
        history = list(self._history)
        (start, tokens_before, *before), (end, tokens_after, *after) = history[0], history[-1]
        seconds = (end - start) / max(1, tokens_after - tokens_before)
        tokens = counted(self._max_tokens or self.tokens, "token")
        parts = [f"{self.tokens:,} of {tokens}" if self._max_tokens else tokens, f"{format_seconds(seconds)}/token"]
        for source, limited_by, old, new in zip(
            (self._stats.source, HOST_MEMORY), (DISK, H2D), before, after, strict=True
        ):
            if new > old:
                rate = (new - old) / max(end - start, 1e-9)
                limit = self._observer.rates.get(limited_by)  # of the disk there is none for what the page cache gives
                share = f" ({rate / limit.per_second:.0%})" if limit else ""
                parts.append(f"{format_rate(rate)} from {source}{share}")
        parts.append(format_bytes(self._observer.used_bytes()))
        if seconds > SLOW_SECONDS:
            parts.append("layer {} of {}".format(*self._layer()))
        return ", ".join(parts)


def progress(
    wanted: Progress, observer: Observer, stats: StreamStats, max_tokens: int | None, has_streamer: bool
) -> AbstractContextManager[Any]:
    """What shows how a call of `generate` goes.

    "auto" shows it in notebooks, and on a terminal as long as nobody prints the text as it comes.
    """
    if not wanted or (wanted == "auto" and not in_notebook() and (has_streamer or not can_draw())):
        return nullcontext()
    if in_notebook() or not can_draw():
        return _tqdm(observer, stats, max_tokens)
    return _line(observer, stats, max_tokens)


@contextmanager
def _line(observer: Observer, stats: StreamStats, max_tokens: int | None) -> Iterator[None]:
    line = LiveLine(observer, stats, max_tokens=max_tokens)
    with line.following(), showing(line.text):
        yield


@contextmanager
def _tqdm(observer: Observer, stats: StreamStats, max_tokens: int | None) -> Iterator[None]:
    """The line as a progress bar that stays: in a notebook's output, or in what standard error is redirected to."""
    from tqdm import tqdm

    out: Any = sys.stdout if in_notebook() else sys.stderr
    with tqdm(total=max_tokens, file=out, unit=" tokens", bar_format=TQDM_FORMAT) as shown:

        def on_step() -> None:
            shown.set_description_str(line.text(), refresh=False)
            shown.update(min(line.tokens, max_tokens or line.tokens) - shown.n)

        def before_the_first_token() -> None:
            if not line.tokens:
                shown.set_description_str(line.text())

        line = LiveLine(observer, stats, on_step)
        with line.following(), repeating(before_the_first_token):
            yield
