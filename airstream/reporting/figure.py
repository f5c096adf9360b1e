"""This has what all pictures share: matplotlib, if it is there, and files that it can write."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from airstream.errors import ArgumentError, UnsupportedError
from airstream.reporting.extras import install
from airstream.reporting.outputs import check_output, written


def new_figure(width: float = 8, height: float = 5.4) -> Any:
    """An empty `matplotlib.figure.Figure`, in inches. Needs matplotlib, which the extra `plot` brings.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, nothing that the whole process shares
    except ImportError:
        raise UnsupportedError(f"drawing needs matplotlib: {install('matplotlib', 'plot')}") from None

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            """What a notebook shows, without pyplot."""
            png = io.BytesIO()
            self.savefig(png, format="png")
            return png.getvalue()

    return Picture(figsize=(width, height), dpi=110, layout="constrained")


def check_file(figure: Any, file: Path) -> None:
    """Refuse a file that cannot be written, before seconds are spent on what goes into it.

    Raises:
        ArgumentError: matplotlib does not know its ending, there is no such folder, or it is no file.
    """
    known = sorted(figure.canvas.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in known:
        raise ArgumentError(f"{file} is no kind of picture that can be drawn: use .{', .'.join(known)}")
    check_output(file)


def save_figure(figure: Any, file: Path) -> None:
    """Write `figure` to `file`, whose ending says as what.

    Raises:
        ArgumentError, DiskSpaceError: it cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=file.suffix.removeprefix(".").lower())
    with written(file) as out:
        out.write(drawn.getbuffer())
