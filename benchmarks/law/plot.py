"""Draw the results of `benchmarks.law`: s/token by the share of the weights in memory, against the law's line.

    python -m benchmarks.law.plot results.json law.png [--linear]

Needs matplotlib (`pip install matplotlib`). Every series has a marker and a line of its own, so that the picture
survives greyscale.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.charts import BLUE, GREY, INK, check_matplotlib
from benchmarks.law.report import TOLERANCE

ORANGE, RED, BAND = "#e08214", "#a33b32", "#e6e6e6"
DASHED = {"color": GREY, "linewidth": 1.1, "linestyle": (0, (5, 3)), "zorder": 2}
GRID_STEPS = 400

MEASURED = "airstream, measured (median; bar: min to max)"
PREDICTED = "airstream, predicted by its plan"
CLIFF = "llama.cpp, mmap: weights that fit the limit"
LAW = "the law: max(bytes / raw link, compute)"
ALLOWED = f"{TOLERANCE:.2f} times the law"
LEGEND_ORDER = (MEASURED, PREDICTED, CLIFF, LAW, ALLOWED)

Point = Mapping[str, Any]


def law_line(points: Sequence[Point], steps: int = GRID_STEPS) -> tuple[list[float], list[float]]:
    """Per cent in memory and max(bytes / link, compute), in small steps, so that the corner of the law is sharp.

    Between two shares the raw link is interpolated; it is the same disk, but shorter runs may read more slowly.
    """
    computes = [point["compute_seconds"]["median"] for point in points if point["compute_seconds"]]
    compute = computes[-1] if computes else 0.0  # of the largest share, which has it from all its turns
    known = [
        (point["share"], point["link_bytes_per_second"]["median"]) for point in points if point["link_bytes_per_second"]
    ]
    if not points or not known:
        return [0.0, 100.0], [compute, compute]
    full = points[0]["full_pass_bytes"]
    first, last = min(point["share"] for point in points), max(point["share"] for point in points)
    shares = [first + (last - first) * step / steps for step in range(steps + 1)]
    seconds = [max((1 - share) * full / _interpolated(known, share), compute) for share in shares]
    return [100 * share for share in shares], seconds


def _interpolated(known: Sequence[tuple[float, float]], x: float) -> float:
    """The value at `x` on straight lines between `known`; beyond its ends, that of the end."""
    known = sorted(known)
    for (left, low), (right, high) in pairwise(known):
        if left <= x <= right and right > left:
            return low + (high - low) * (x - left) / (right - left)
    return known[0][1] if x < known[0][0] else known[-1][1]


def draw(results: Mapping[str, Any], out: Path, is_log: bool = True) -> None:
    """Write the picture of `report.as_json`'s results to the file `out`.

    Raises:
        ImportError: matplotlib is not there.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    _draw_seconds(upper, results, is_log)
    _draw_ratios(lower, results["points"])
    upper.set_title("What a token costs, by how much of the model is in memory", loc="left", weight="bold", pad=24)
    upper.text(0, 1.025, _conditions(results), transform=upper.transAxes, fontsize=8.5, color="#444444")
    lower.set_xlabel("weights in memory (% of what a pass would read)")
    figure.savefig(out, dpi=160)


def _draw_seconds(axes: Any, results: Mapping[str, Any], is_log: bool) -> None:
    points, cliff = results["points"], results["llamacpp"]
    shares, law = law_line(points)
    allowed = [TOLERANCE * seconds for seconds in law]
    axes.fill_between(shares, law, allowed, color=BAND, linewidth=0, zorder=1)
    axes.plot(shares, law, color=INK, linewidth=1.6, label=LAW, zorder=2)
    axes.plot(shares, allowed, label=ALLOWED, **DASHED)
    if cliff:
        _draw_spreads(axes, cliff["points"], "seconds_per_token", RED, marker="^", linestyle=":", label=CLIFF, zorder=3)
    predicted = [(100 * p["share"], p["predicted_seconds"]["median"]) for p in points if p["predicted_seconds"]]
    if predicted:
        places = tuple(zip(*predicted, strict=True))
        axes.scatter(*places, s=110, marker="D", color="none", edgecolor=ORANGE, label=PREDICTED, zorder=4)
    _draw_spreads(axes, points, "seconds_per_token", BLUE, marker="o", linestyle="none", label=MEASURED, zorder=5)
    axes.set_ylabel("seconds per token after the first")
    axes.set_yscale("log" if is_log else "linear")
    if is_log:
        _plain_log_ticks(axes)
    else:
        axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    ordered = sorted(zip(labels, handles, strict=True), key=lambda entry: LEGEND_ORDER.index(entry[0]))
    labels, handles = zip(*ordered, strict=True)
    axes.legend(handles, labels, loc="best", fontsize=9, framealpha=1, edgecolor="none")
    _tidy(axes)


def _draw_spreads(axes: Any, points: Sequence[Point], key: str, color: str, **style: Any) -> None:
    """The medians of `key` with a bar from minimum to maximum."""
    found = [(100 * point["share"], point[key]) for point in points if point[key]]
    if not found:
        return
    middle = [spread["median"] for _, spread in found]
    bars = [
        [spread["median"] - spread["min"] for _, spread in found],
        [spread["max"] - spread["median"] for _, spread in found],
    ]
    defaults = {"markersize": 7, "capsize": 4, "elinewidth": 1.2, "linewidth": 1.4}
    axes.errorbar([x for x, _ in found], middle, yerr=bars, color=color, **defaults, **style)


def _draw_ratios(axes: Any, points: Sequence[Point]) -> None:
    axes.axhspan(1, TOLERANCE, color=BAND, linewidth=0, zorder=1)
    axes.axhline(1, color=INK, linewidth=1.6, zorder=2)
    axes.axhline(TOLERANCE, **DASHED)
    _draw_spreads(axes, points, "ratio", BLUE, marker="o", linestyle="none", zorder=5)
    found = [point for point in points if point["ratio"]]
    low = min([0.95, *(point["ratio"]["min"] for point in found)])
    high = max([1.15, *(point["ratio"]["max"] for point in found)])
    margin = 0.12 * (high - low)
    axes.set_ylim(low - margin, high + 3 * margin)
    for point in found:  # in a row above everything that is drawn
        place = (100 * point["share"], high + 1.2 * margin)
        style = {"ha": "center", "size": 9, "color": BLUE, "bbox": {"color": "white", "pad": 1}}
        axes.annotate(f"{point['ratio']['median']:.2f}", place, **style)
    axes.set_ylabel("measured / law")
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlim(-4, 104)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, which="major")
    axes.set_axisbelow(True)


def _plain_log_ticks(axes: Any) -> None:
    """1, 2, 5 and so on in figures that people read, instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _conditions(results: Mapping[str, Any]) -> str:
    model, machine = results["model"], results["machine"]
    rates = [point["link_bytes_per_second"]["median"] for point in results["points"] if point["link_bytes_per_second"]]
    link = f", raw link {min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f} GB/s" if rates else ""
    return (
        f"{model['weight_bytes'] / 1e9:.2f} GB of {model['dtype']} weights ({model['model_type']}); {machine['cpu']}, "
        f"{machine['cores']} cores{link}; turns: {results['turns']}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON that benchmarks.law wrote")
    parser.add_argument("out", type=Path, help="the picture: .png, .svg, .pdf")
    parser.add_argument("--linear", action="store_true", help="seconds on a linear scale, not a logarithmic one")
    args = parser.parse_args(argv)
    draw(json.loads(args.results.read_text()), args.out, is_log=not args.linear)


if __name__ == "__main__":
    main()
