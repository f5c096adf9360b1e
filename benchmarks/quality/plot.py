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
    "divergence": "KL divergence from bf16 (nats a token)",
    "rise": "perplexity above bf16's (%)",
}
SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}


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
    factor = 100 if key == "rise" else 1
    exact = [row for row in rows if row["kernels"] == "exact" and row["name"] != REFERENCE]
    axes.axhline(0, color=GREY, linewidth=1.0)
    for row in exact:
        middle, error = (factor * number for number in row[key])
        is_peer = row["name"].startswith("GGUF")
        face, edge = ("white", GREY) if is_peer else (BLUE, BLUE)
        style = {"color": edge, "markerfacecolor": face, "markersize": 8, "capsize": 3, "elinewidth": 1.2}
        axes.errorbar(row["share"], middle, yerr=error, marker="s" if is_peer else "o", zorder=3, **style)
        _label(axes, row, middle, GREY if is_peer else INK, is_peer)
    axes.set_xlabel("bytes of the layers, of bf16's", fontsize=9.5)
    axes.set_xlim(0.18, 0.86)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _label(axes: Any, row: Mapping[str, Any], middle: float, colour: str, is_peer: bool) -> None:
    """The name beside the point: of peers on the right, of the others where that is free."""
    place, side = ((8, -3), "left") if is_peer else ((-8, -3), "right")
    if row["name"] == "lossless":
        place, side = (0, 9), "center"
    axes.annotate(row["name"], (row["share"], middle), xytext=place, ha=side, color=colour, **SMALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="the JSON that benchmarks.quality has written")
    parser.add_argument("out", type=Path, help="the picture: .png, .svg, .pdf")
    args = parser.parse_args(argv)
    draw(json.loads(args.results.read_text()), args.out)


if __name__ == "__main__":
    main()
