"""These notes tell the user, on stderr, what is not part of the output of a command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from airstream.reporting.status import can_draw


def program() -> str:
    """What to type for airstream here: its name where a shell finds it, or the file that was called."""
    called = sys.argv[0]
    return "airstream" if shutil.which("airstream") or Path(called).stem != "airstream" else called


def tell(doing: str) -> None:
    """Say what is being done where no line can show it, in a line that stays."""
    if not can_draw():
        note(f"airstream: {doing}")


def note(text: str) -> None:
    """Tell the user something that is not part of the output."""
    print(text, file=sys.stderr, flush=True)
