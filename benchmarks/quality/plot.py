"""Draw what `benchmarks.quality` has measured: `python -m benchmarks.quality.plot RESULTS.json OUT.png`."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.charts import BLUE, GREY, INK, check_matplotlib
from benchmarks.quality.report import REFERENCE, caption, summarise

PANELS = {
    "divergence": "KL divergence from bf16, nats a token",
    "rise": "perplexity above bf16's, %",
}
TICKS = {"divergence": (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1), "rise": (-1, 0, 1, 2, 5, 10, 20, 50, 100)}
"""The first one above 0 is where the scale becomes linear, so that 0 has a place on it."""
SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9.5}
DASHED = {"color": GREY, "linewidth": 1.1, "linestyle": (0, (5, 3))}


def draw(results: Mapping[str, Any], out: Path) -> None:
    """Write the picture of `results` to `out`: what is lost over the bytes that are left.

    Raises:
        ImportError: matplotlib is not there.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = summarise(results["forms"])
    for axes, (key, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _draw_panel(axes, rows, key)
        axes.set_title(label, loc="left", fontsize=10, color=INK)
    figure.suptitle("What fewer bytes cost in quality", x=0.01, ha="left", weight="bold", fontsize=12)
    small_print = "\n".join(textwrap.wrap(caption(results), 150))
    figure.supxlabel(small_print, x=0.01, ha="left", fontsize=7.5, color="#444444")
    figure.savefig(out, dpi=150)


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    axes.axhline(0, color=GREY, linewidth=1.0)
    for row in rows:
        if row["kernels"] == "exact" and row["name"] != REFERENCE:
            _draw_form(axes, row, key)
        elif row["name"] == REFERENCE and row["kernels"] == "fast" and key == "divergence":
            axes.axhline(row[key][0], **DASHED)
            place = (1, row[key][0])
            axes.annotate("bf16, rounded otherwise", place, xytext=(0, 4), ha="right", color=GREY, **SMALL)
    _scale(axes, key)
    axes.set_xlabel("bytes of the layers, as a share of bf16's", fontsize=9.5)
    axes.set_xlim(0.15, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_form(axes: Any, row: Mapping[str, Any], key: str) -> None:
    """A point, with its error; the name stands on the right of peers, on the left of the others."""
    middle, error = (number * (100 if key == "rise" else 1) for number in row[key])
    is_peer = row["name"].startswith("GGUF")
    colour, face, marker = (GREY, "white", "s") if is_peer else (BLUE, BLUE, "o")
    style = {"color": colour, "markerfacecolor": face, "markersize": 7.5, "capsize": 3, "elinewidth": 1.2}
    axes.errorbar(row["share"], middle, yerr=error or None, marker=marker, zorder=3, **style)
    place, side = ((9, -4), "left") if is_peer else ((-9, -4), "right")
    if not error:
        place, side = (7, 6), "left"  # above the line at 0, and off its neighbours
    ink = GREY if is_peer else INK
    axes.annotate(row["name"], (row["share"], middle), xytext=place, ha=side, color=ink, **SMALL)


def _scale(axes: Any, key: str) -> None:
    """Logarithmic, but linear around 0, in figures that people read."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_ylim()
    linear = next(tick for tick in TICKS[key] if tick > 0)
    axes.set_yscale("symlog", linthresh=linear, linscale=0.6)
    axes.yaxis.set_major_locator(FixedLocator(TICKS[key]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(min(low, -0.25 * linear) if key == "rise" else -0.25 * linear, 1.3 * high)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="the JSON that benchmarks.quality has written")
    parser.add_argument("out", type=Path, help="the picture: .png, .svg, .pdf")
    args = parser.parse_args(argv)
    draw(json.loads(args.results.read_text()), args.out)


if __name__ == "__main__":
    main()
