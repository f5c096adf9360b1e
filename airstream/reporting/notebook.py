"""This knows whether this runs in a notebook, and a line in a cell's output that can be replaced.

It knows IPython, if it is there already. It refuses to know what the line says.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

KERNELS = ("ZMQInteractiveShell", "Shell")
"""Shells of Jupyter and of Colab."""


def shell_of_notebook() -> Any:
    """The shell of the notebook that this runs in; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if shell is not None and shell.__class__.__name__ in KERNELS else None


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel."""
    return shell_of_notebook() is not None


class CellLine:
    """A line of its own in the output of the cell that runs: replaced in its place, and empty in the end.

    Args:
        text: asked for what the line says whenever it is drawn.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._publisher = getattr(shell_of_notebook(), "display_pub", None)
        self._name = {"display_id": f"airstream-{id(self):x}"}
        self._shown: str | None = None
        self._lock = threading.Lock()

    def draw(self) -> None:
        """Show what the line says by now."""
        self._show(self._text())

    def erase(self) -> None:
        """Leave the line empty."""
        if self._shown:
            self._show("")

    def _show(self, text: str) -> None:
        with self._lock:
            if self._publisher is not None and text != self._shown:
                is_new, self._shown = self._shown is None, text
                self._publisher.publish({"text/plain": text}, transient=self._name, update=not is_new)
