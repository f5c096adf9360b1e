"""Draw comparisons: a bar for every system of one case, and one system over the sizes of models.

    python -m benchmarks.suite.plot RESULTS.json... --out chart.png

Several results of the cases `scale-*` give the picture of the scale. Needs matplotlib: `pip install matplotlib`.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import conditions
from benchmarks.charts import BLUE, GREY, INK, check_matplotlib

OURS = "airstream"
SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5}
LIGHT = "#c9c9c9"
PANELS = {"decode_seconds_per_token": "s/token after the first", "seconds_per_token": "s/token, the first included"}
Results = Mapping[str, Any]


def draw_case(results: Results, out: Path) -> None:
    """Bars for the medians of one comparison, with minimum and maximum. What failed is named.

    Raises:
        ImportError: matplotlib is not there.
    """
    figure = _figure(8.6, 1.4 + 0.42 * max(len(_systems(results)), 2))
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (metric, label) in zip(panels, PANELS.items(), strict=True):
        _draw_bars(axes, results, metric)
        axes.set_xlabel(label)
    figure.suptitle(results.get("title", "comparison"), x=0.01, ha="left", weight="bold", fontsize=11)
    figure.supxlabel(_small_print(results), fontsize=7.5, color="#444444")
    figure.savefig(out, dpi=150)


def _systems(results: Results) -> list[str]:
    return list(dict.fromkeys(run["system"] for run in results["runs"]))


def _draw_bars(axes: Any, results: Results, metric: str) -> None:
    systems = _systems(results)
    medians = results["medians"]
    longest = max((medians[system][metric]["max"] for system in systems if system in medians), default=1.0)
    for row, system in enumerate(systems):
        if system not in medians:
            axes.text(0.01 * longest, row, "failed", va="center", fontsize=9, style="italic", color=INK)
            continue
        spread = medians[system][metric]
        middle = spread["median"]
        bar = [[middle - spread["min"]], [spread["max"] - middle]]
        colour = BLUE if system == OURS else LIGHT
        style = {"ecolor": GREY, "capsize": 3, "edgecolor": INK, "linewidth": 0.6}
        axes.barh(row, middle, xerr=bar, height=0.62, color=colour, **style)
        axes.text(spread["max"] + 0.02 * longest, row, f"{middle:.2f}", va="center", fontsize=9)
    axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * longest)
    axes.spines[["top", "right"]].set_visible(False)


def draw_scale(all_results: Sequence[Results], out: Path) -> None:
    """s/token and peak memory of airstream over the bytes of weights, in one budget: a line, and a level.

    Raises:
        ImportError: matplotlib is not there.
    """
    points = [(results["model"]["weight_bytes"] / 1e9, results) for results in all_results]
    points.sort(key=lambda point: point[0])
    figure = _figure(8.6, 4.3)
    seconds, memory = figure.subplots(1, 2)
    sizes = [size for size, _ in points]
    _draw_points(
        seconds, sizes, [results["medians"][OURS]["decode_seconds_per_token"] for _, results in points], (9, -4)
    )
    seconds.set_ylabel("seconds per token after the first")
    _draw_points(memory, sizes, [results["medians"][OURS]["peak_rss_gb"] for _, results in points], (7, -13))
    limit = points[0][1]["limit_mib"]
    if limit is not None:
        memory.axhline(limit * 2**20 / 1e9, color=GREY, linestyle=(0, (5, 3)), linewidth=1.1)
        memory.annotate(f"the limit, {limit} MiB", (0, limit * 2**20 / 1e9), xytext=(4, 4), color=GREY, **SMALL)
    memory.set_ylabel("peak memory, GB")
    for axes in (seconds, memory):
        axes.set_xlabel("weights, GB")
        axes.set_xlim(0, 1.12 * sizes[-1])
        axes.set_ylim(-0.03 * axes.get_ylim()[1], 1.12 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Models of several sizes in the same memory", x=0.01, ha="left", weight="bold", fontsize=11)
    figure.supxlabel("The largest: " + _small_print(points[-1][1]), fontsize=7.5, color="#444444")
    figure.savefig(out, dpi=150)


def _draw_points(
    axes: Any, sizes: Sequence[float], spreads: Sequence[Mapping[str, float]], label_at: tuple[int, int]
) -> None:
    middle = [spread["median"] for spread in spreads]
    bars = [
        [spread["median"] - spread["min"] for spread in spreads],
        [spread["max"] - spread["median"] for spread in spreads],
    ]
    axes.errorbar(sizes, middle, yerr=bars, color=BLUE, marker="o", markersize=6, capsize=4, linewidth=1.4)
    for size, value in zip(sizes, middle, strict=True):
        axes.annotate(f"{value:.2f}", (size, value), xytext=label_at, **SMALL)


def _figure(width: float, height: float) -> Any:
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _small_print(results: Results) -> str:
    """What was measured, and the machine."""
    return "\n".join(textwrap.wrap(conditions.caption(dict(results)).replace("\n", " "), 130))


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON that benchmarks.suite has written, or its compare")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .svg, .pdf")
    args = parser.parse_args(argv)
    results = [json.loads(file.read_text()) for file in args.results]
    draw_case(results[0], args.out) if len(results) == 1 else draw_scale(results, args.out)


if __name__ == "__main__":
    main()
