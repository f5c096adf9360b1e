"""Text on a terminal as it is generated, and below it a line about how fast it comes."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from transformers import TextStreamer

SAVE, RESTORE = "\x1b7", "\x1b8"
MAKE_ROOM = "\x1bD\x1b[A"
"""One line down and up again: scrolls where the text has reached the bottom. The column stays."""

LINE_BELOW = "\x1b[B\r\x1b[2K"
"""To the beginning of the line below, which is cleared."""


def can_show_status() -> bool:
    """Whether text and status go to one terminal that understands escape sequences."""
    is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    return is_terminal and sys.platform != "win32" and os.environ.get("TERM", "dumb") != "dumb"


class StatusPrinter(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Prints tokens to standard output as they come, without the prompt, and keeps `status` on the line below."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._status = ""

    def show(self, status: str) -> None:
        """Put `status` in the place of the one before."""
        self._status = status[: shutil.get_terminal_size().columns - 1]
        self._write(f"{MAKE_ROOM}{SAVE}{LINE_BELOW}\x1b[2m{self._status}\x1b[0m{RESTORE}")

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._status:
            self._write(f"{SAVE}{LINE_BELOW}{RESTORE}")
        super().on_finalized_text(text, stream_end)
        if self._status and not stream_end:
            self.show(self._status)

    @staticmethod
    def _write(codes: str) -> None:
        sys.stdout.write(codes)
        sys.stdout.flush()
