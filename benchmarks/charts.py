"""What all charts share: the colours, and whether there is anything to draw with. It draws nothing itself."""

from __future__ import annotations

from importlib.util import find_spec

INK, GREY, BLUE = "#111111", "#777777", "#1f4e9c"


def check_matplotlib() -> None:
    """Find out before hours of measuring whether a picture can be drawn.

    Raises:
        ImportError: matplotlib is not there.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("a picture needs matplotlib: pip install matplotlib")
