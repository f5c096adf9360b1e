"""The status line says on a terminal what goes on, while it goes on: a thread redraws it, and it is erased at the end.

It knows terminals, and nothing that takes time to import. It refuses to know what the line says.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from airstream.reporting.notebook import CellLine, in_notebook

MAKE_ROOM = "\x1bD\x1b[A"
"""One line down and up again: scrolls where the text has reached the bottom. The column stays."""

ERASE = "\x1b[J"
"""Everything from the cursor on. Below it there is nothing but what was drawn here."""

SAVE, RESTORE, BELOW, DIM, PLAIN = "\x1b7", "\x1b8", "\x1b[B\r", "\x1b[2m", "\x1b[0m"

UNDERSTANDS_CODES = 4
"""The mode of a Windows console that does (ENABLE_VIRTUAL_TERMINAL_PROCESSING)."""

SECONDS = 0.2
"""From one drawing to the next."""

BAR_WIDTH = 20

COLUMNS = 80
"""Of a terminal of which nobody knows how wide it is."""


def can_draw(stream: Any = None) -> bool:
    """Whether `stream`, standard error by default, is a terminal that understands escape sequences."""
    stream = sys.stderr if stream is None else stream
    is_terminal = stream is not None and not stream.closed and stream.isatty()
    if not is_terminal or os.environ.get("TERM") == "dumb":
        return False
    return _agrees(stream) if sys.platform == "win32" else bool(os.environ.get("TERM"))


def _agrees(stream: Any) -> bool:
    """Whether the Windows console behind `stream` agrees to understand escape sequences: it has to be asked."""
    import ctypes
    import msvcrt

    kernel: Any = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    handle, mode = msvcrt.get_osfhandle(stream.fileno()), ctypes.c_ulong()  # type: ignore[attr-defined,unused-ignore]
    is_console = kernel.GetConsoleMode(handle, ctypes.byref(mode))
    return bool(is_console and kernel.SetConsoleMode(handle, mode.value | UNDERSTANDS_CODES))


def columns_of(stream: Any) -> int:
    """How wide the terminal is that `stream` writes to, or narrower if the environment says so: no line may wrap.

    Standard output, which Python would ask, may be a file.
    """
    limit = os.environ.get("COLUMNS", "")
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0  # as of terminals that have not been told
    widths = [width for width in (columns, int(limit) if limit.isdecimal() else 0) if width]
    return min(widths, default=COLUMNS)


def bar(share: float) -> str:
    """`"[#####...............]"` for a quarter."""
    filled = round(BAR_WIDTH * min(max(share, 0.0), 1.0))
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]"


class StatusLine:
    """A line below the cursor of standard error, which stays where it is: what is written meanwhile is not disturbed.

    It stays on the stream that was standard error when it began: others may be silenced meanwhile by another one.

    Args:
        text: asked for what the line says whenever it is drawn; on the thread that draws.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._stream = sys.stderr
        self._shown = ""
        self._lock = threading.Lock()

    def draw(self) -> None:
        """Show what the line says by now."""
        text = fit(self._text(), columns_of(sys.stderr) - 1)
        with self._lock:
            if text != self._shown:
                self._shown = text
                shown = text if os.environ.get("NO_COLOR") else f"{DIM}{text}{PLAIN}"
                self._send(f"{ERASE}{MAKE_ROOM}{SAVE}{BELOW}{shown}{RESTORE}")

    def erase(self) -> None:
        """Take the line off the terminal, if it is there."""
        with self._lock:
            if self._shown:
                self._shown = ""
                self._send(ERASE)

    def write(self, text: str) -> None:
        """Let `text` go to standard output, where the cursor is."""
        self.erase()
        with self._lock:
            sys.stdout.write(text)
            sys.stdout.flush()
        self.draw()

    def _send(self, codes: str) -> None:
        try:
            self._stream.write(codes)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal went away; whoever has something to say will be told
            pass


@contextmanager
def repeating(call: Callable[[], None]) -> Iterator[None]:
    """Call it at once, and from another thread again and again for as long as this lasts."""
    ended = threading.Lock()  # an Event that is interrupted might keep its lock for ever
    ended.acquire()

    def repeat() -> None:
        while not ended.acquire(timeout=SECONDS):
            call()

    call()
    thread = threading.Thread(target=repeat, name="airstream-status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.release()
        thread.join()


class Activity:
    """What is being done, in steps that are known beforehand: `"loading tiny [#####...............] planning, 3 s"`.

    Args:
        is_timed: say how long it has been going on. A line without that is drawn once a step, and leaves alone what
            others draw meanwhile.
    """

    def __init__(self, what: str, steps: Sequence[str] = (), is_timed: bool = True) -> None:
        self._what = what
        self._steps = steps
        self._step = steps[0] if steps else ""
        self._is_timed = is_timed
        self._started = time.monotonic()

    def begin(self, step: str) -> None:
        """The step before has ended. From now on the time is told."""
        self._step = step
        self._is_timed = True

    def text(self) -> str:
        """What the line says by now."""
        seconds = int(time.monotonic() - self._started) if self._is_timed else 0
        parts = [self._what]
        if self._step:
            parts += [bar(self._steps.index(self._step) / len(self._steps)), self._step]
        return f"{' '.join(parts)}{f', {seconds} s' if seconds else ' ...'}"


class Share:
    """What is being done, and how much of it is: `"planning tiny [#####...............] 25%"`. Nothing at first."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._share = 0.0

    def reach(self, share: float) -> None:
        """So much is done by now."""
        self._share = share

    def text(self) -> str:
        """What the line says by now."""
        return f"{self._what} {bar(self._share)} {self._share:.0%}" if self._share else f"{self._what} ..."


@contextmanager
def status(what: str, is_wanted: bool = True, is_timed: bool = True) -> Iterator[None]:
    """Show what is being done for as long as this lasts, on a terminal or in a notebook; elsewhere, nothing."""
    with showing(Activity(what, is_timed=is_timed).text, is_wanted):
        yield


@contextmanager
def showing(text: Callable[[], str], is_wanted: bool = True) -> Iterator[StatusLine | None]:
    """A line that says what `text` gives, on a terminal or in a notebook. Erased however this ends.

    Gives the terminal's, for who writes beside it; None elsewhere.
    """
    if not is_wanted or not (in_notebook() or can_draw()):
        yield None
        return
    line = CellLine(text) if in_notebook() else StatusLine(text)
    try:
        with repeating(line.draw):
            yield line if isinstance(line, StatusLine) else None
    finally:
        line.erase()


def fit(text: str, columns: int) -> str:
    """As much of `text` as a line of so many columns can show, without what would move the cursor."""
    shown = []
    for character in text:
        character = character if character.isprintable() else "?"
        columns -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns < 0:
            break
        shown.append(character)
    return "".join(shown)
