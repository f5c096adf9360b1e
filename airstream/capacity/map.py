"""This draws seconds per token over sizes of memory. It needs matplotlib, which the extra `plot` brings.

It knows matplotlib. It refuses to know how the numbers come about: `landscape` has them.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from airstream.capacity.landscape import Landscape, survey
from airstream.capacity.rows import short_name
from airstream.capacity.scales import levels_between, set_seconds, set_sizes, size_text
from airstream.loading.machine import THIS_MACHINE, Machine
from airstream.loading.prepare import prepare_for_planning
from airstream.plan.facts import ModelFacts
from airstream.plan.policy import AUTO_SHARE
from airstream.plan.request import Request
from airstream.reporting.figure import check_file, new_figure, save_figure
from airstream.reporting.paths import path_of
from airstream.reporting.status import Share, showing
from airstream.reporting.units import counted, format_bytes, format_seconds

__all__ = ["plot_plan"]

APART = 0.035
"""Of the width: lines of seconds that come nearer to each other than this are left out."""

COLOURS, DARKEST, SHADES = "YlGnBu", 0.72, 48
"""From light to dark as seconds grow, also without colours, and never so dark that black is hard to read on it."""

LABEL_ROWS = (0.3, 0.12, 0.8, 0.55, 0.92)
"""Of the height, where a line may have its label: the first at which there is room."""

EDGE = 0.015
"""Of the width and height: how far from the edge a machine is marked that is beyond it."""

STAR = {"marker": "*", "markersize": 14, "color": "black", "markeredgecolor": "white"}

USED, GIVEN = f"in {{unit}}, of which {AUTO_SHARE:.0%} is used", "in {unit}, all of which is used"

DOES_NOT_FIT = "0.9"
"""The grey of sizes that do not do."""


def plot_plan(
    model: str | os.PathLike[str],
    *,
    machine: Machine = THIS_MACHINE,
    file: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Draw the predicted seconds per token of `model` over sizes of memory, as a `matplotlib.figure.Figure`.

    With an accelerator it is a map over its memory and the host's; where the CPU computes, a curve over host memory.
    A star shows where `machine` is, or an arrow at the edge that it is beyond. Plans hundreds of times, for seconds.

    Args:
        model: folder or hub id; its config is enough.
        machine: whose rates are used: this one, or `Machine(gpu="RTX 3090", ram="64GiB", disk_gbps=7)`.
        file: to write; its ending says in which format: .png, .svg, .pdf.
        options: as `AutoModel.from_pretrained`.

    Raises:
        UnsupportedError: matplotlib is not installed.
        ArgumentError: `file` has an ending that matplotlib does not know, or an option makes no sense.
    """
    figure = new_figure()
    if file is not None:
        file = path_of("file", file)
        check_file(figure, file)
    counted_off = Share(f"planning {short_name(model)}")
    with showing(counted_off.text):
        asked = prepare_for_planning(model, options, machine)
        landscape = survey(asked.facts, asked.request, counted_off.reach)
    axes = figure.subplots()
    if landscape.device_bytes:
        _draw_map(figure, axes, landscape)
    else:
        _draw_curve(axes, landscape)
    title = f"{short_name(model)}{_title(landscape, asked.facts, asked.request, machine)}"
    axes.set_title(title, fontsize=11, loc="left")
    if file is not None:
        save_figure(figure, file)
    return figure


def _title(landscape: Landscape, facts: ModelFacts, request: Request, machine: Machine) -> str:
    hardware = request.hardware
    assert hardware is not None  # there is always something to assume
    sequences = f"{counted(request.max_batch_size, 'sequence')} of " if request.max_batch_size > 1 else ""
    bus = f"bus {hardware.h2d.per_second / 1e9:.3g} GB/s, " if hardware.h2d is not None else ""
    where = request.device if machine.card is None else machine.card.name
    return (
        f": {format_bytes(facts.checkpoint_bytes)} in {facts.dtype}, {sequences}{counted(landscape.context, 'token')}\n"
        f"{where}: {bus}disk {hardware.disk.per_second / 1e9:.3g} GB/s ({hardware.disk.source})"
    )


# ------------------------------------------------------------------------------------------------------------- the map


def _draw_map(figure: Any, axes: Any, landscape: Landscape) -> None:
    x, y = landscape.device_bytes, landscape.host_bytes
    by_ram = zip(*landscape.spots, strict=True)
    seconds = [[math.nan if spot is None else spot.seconds for spot in row] for row in by_ram]
    levels = _draw_seconds(figure, axes, x, y, seconds)
    set_sizes(axes, "x", x, f"VRAM {_use(landscape.shares[0])}")
    set_sizes(axes, "y", y, f"RAM {_use(landscape.shares[1])}")
    axes.set_facecolor(DOES_NOT_FIT)  # below, where host memory is too small
    _shade(axes, x, sum(not any(spots) for spots in landscape.spots))
    room = _Room(axes)
    _mark(axes, room, landscape)
    _draw_edge(axes, room, landscape)
    _label_lines(room, seconds, levels)


def _draw_seconds(
    figure: Any, axes: Any, x: Sequence[int], y: Sequence[int], seconds: Sequence[Sequence[float]]
) -> list[float]:
    """Shades, and lines at round numbers of seconds, which are returned."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    values = [value for row in seconds for value in row if not math.isnan(value)]
    low, high = 0.999 * min(values), 1.001 * max(values)
    ticks = list(levels_between(low, high))
    levels = _apart(seconds, ticks)
    shades = [low * (high / low) ** (step / SHADES) for step in range(SHADES + 1)]
    colours = ListedColormap([colormaps[COLOURS](DARKEST * step / 255) for step in range(256)])
    filled = axes.contourf(x, y, seconds, levels=shades, norm=LogNorm(low, high), cmap=colours)
    filled.set_edgecolor("face")  # else there are hair lines between the shades
    if levels:
        axes.contour(x, y, seconds, levels=levels, colors="black", linewidths=0.7)
    bar = figure.colorbar(filled, ax=axes, label="predicted seconds per token", ticks=ticks, format="%g")
    bar.minorticks_off()
    return levels


def _apart(seconds: Sequence[Sequence[float]], levels: Sequence[float]) -> list[float]:
    """Those of rising `levels` whose lines can be told apart, at every height where one may have its label."""
    rows = [seconds[round(height * (len(seconds) - 1))] for height in LABEL_ROWS]
    kept: list[float] = []
    for level in reversed(levels):  # from the left to the right
        pairs = [(_crossing(row, kept[-1]), _crossing(row, level)) for row in rows] if kept else []
        gaps = [
            (here - there) / (len(seconds[0]) - 1) for there, here in pairs if there is not None and here is not None
        ]
        if min(gaps, default=1.0) >= APART:
            kept.append(level)
    return kept[::-1]


@dataclass
class _Room:
    """Texts on a map, none over another. Places are shares of its width and height."""

    axes: Any
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def write(self, x: float, y: float, text: str, **style: Any) -> bool:
        """`text` around a point, if there is room."""
        half_width, half_height = (0.0064 if style.get("weight") else 0.0055) * len(text) + 0.013, 0.025
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        inside = box[0] > 0 and box[1] > 0 and box[2] < 1 and box[3] < 1
        if not inside or any(_overlap(box, other) for other in self.taken):
            return False
        self.taken.append(box)
        frame = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        style = {"ha": "center", "va": "center", "fontsize": 9, "bbox": frame} | style
        self.axes.text(x, y, text, transform=self.axes.transAxes, **style)
        return True


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _mark(axes: Any, room: _Room, landscape: Landscape) -> None:
    """Where the machine is, or at the edge on that side."""
    vram, ram = landscape.here_bytes
    x, y = _share(landscape.device_bytes, vram), _share(landscape.host_bytes, ram)
    marker, text = _marker(x, y), f"{size_text(vram)} + {size_text(ram)}: {_here(landscape)}"
    x, y = _inside(x), _inside(y)
    axes.plot(x, y, transform=axes.transAxes, zorder=4, **STAR | {"marker": marker})
    room.taken.append((x - 0.02, y - 0.03, x + 0.02, y + 0.03))
    side, height = 0.036 + 0.0064 * len(text), min(max(y, 0.03), 0.97)
    if not room.write(x + side, height, text, weight="bold"):
        room.write(x - side, height, text, weight="bold")


def _marker(x: float, y: float = 0.5) -> str:
    """A star, or what points to where the machine is beyond the edge."""
    if 0 < x < 1 and 0 < y < 1:
        return str(STAR["marker"])
    return (">" if x >= 1 else "<") if not 0 < x < 1 else ("^" if y >= 1 else "v")


def _inside(share: float) -> float:
    return min(max(share, EDGE), 1 - EDGE)


def _draw_edge(axes: Any, room: _Room, landscape: Landscape) -> None:
    """The line above which host memory holds what device memory does not."""
    places = [
        (_share(landscape.device_bytes, vram), _share(landscape.host_bytes, ram))
        for vram, ram in zip(landscape.device_bytes, landscape.ram_without_disk(), strict=True)
        if ram is not None
    ]
    falling = places[: 1 + next((number for number, (_, y) in enumerate(places) if y <= 0), len(places))]
    axes.plot(
        *zip(*falling, strict=True), color="black", linewidth=1.6, linestyle=(0, (4, 2)), transform=axes.transAxes
    )
    for x, y in falling[len(falling) // 8 :]:
        if room.write(x, y + 0.04, "above: nothing from disk", style="italic"):
            break
    room.taken += [(x - 0.005, y - 0.005, x + 0.005, y + 0.005) for x, y in _between(falling)]


def _between(places: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Points of the line through `places`, close to each other."""
    for (x, y), (to_x, to_y) in itertools.pairwise(places):
        yield from ((x + (to_x - x) * part / 10, y + (to_y - y) * part / 10) for part in range(10))


def _shade(axes: Any, sizes: Sequence[float], count: int) -> None:
    """The first `count` sizes of the horizontal axis, which do not do."""
    axes.axvspan(sizes[0], sizes[count], color=DOES_NOT_FIT, zorder=0)
    width = count / (len(sizes) - 1)
    if width > 0.03:
        style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 9, "transform": axes.transAxes}
        axes.text(width / 2, 0.5, "does not fit", **style)


def _label_lines(room: _Room, seconds: Sequence[Sequence[float]], levels: Sequence[float]) -> None:
    """The seconds of a line, where it crosses one of a few heights and nothing else is written."""
    for level in levels:
        for height in LABEL_ROWS:
            row = seconds[round(height * (len(seconds) - 1))]
            at = _crossing(row, level)
            if at is not None and room.write(at / (len(row) - 1), height, f"{level:g} s"):
                break


def _crossing(row: Sequence[float], level: float) -> float | None:
    """The place, counted in values, at which the falling values of `row` pass `level`; between two of them, by logs."""
    for number, (left, right) in enumerate(itertools.pairwise(row)):
        if left >= level > right:
            return number + math.log(left / level) / math.log(left / right)
    return None


# ----------------------------------------------------------------------------------------------------------- the curve


def _draw_curve(axes: Any, landscape: Landscape) -> None:
    (spots,) = landscape.spots
    x = landscape.host_bytes
    fitting = [(size, spot.seconds) for size, spot in zip(x, spots, strict=True) if spot is not None]
    axes.plot(*zip(*fitting, strict=True), color="black", linewidth=1.8)
    set_sizes(axes, "x", x, f"RAM {_use(landscape.shares[0])}")
    here = [landscape.here.seconds] if landscape.here is not None else []
    set_seconds(axes, [*here, *(seconds for _, seconds in fitting)])
    axes.grid(visible=True, color="0.85", linewidth=0.6)
    _shade(axes, x, spots.count(None))
    _mark_curve(axes, landscape)


def _mark_curve(axes: Any, landscape: Landscape) -> None:
    """Where the machine is on the curve, or at the edge on that side."""
    (ram,) = landscape.here_bytes
    share, here = _share(landscape.host_bytes, ram), landscape.here
    low, high = axes.get_ylim()
    seconds = low * (high / low) ** 0.2 if here is None else here.seconds
    x = landscape.host_bytes[0] * (landscape.host_bytes[-1] / landscape.host_bytes[0]) ** _inside(share)
    axes.plot(x, seconds, zorder=4, **STAR | {"marker": _marker(share)})
    beside: dict[str, Any] = {"xytext": (10, 8)}  # the curve falls: there is room on its right, and below
    if share > 0.7:
        beside = {"xytext": (-10, -16), "ha": "right"}
    text = f"{size_text(ram)}: {_here(landscape)}"
    axes.annotate(text, (x, seconds), textcoords="offset points", weight="bold", **beside)


def _use(share: float) -> str:
    return GIVEN if share == 1 else USED


def _here(landscape: Landscape) -> str:
    if landscape.here is None:
        return "does not fit"
    return format_seconds(landscape.here.seconds) + (" (page cache)" if landscape.is_cached else "")


def _share(sizes: Sequence[int], nbytes: float) -> float:
    """Where `nbytes` lies between the first and the last of `sizes`."""
    return math.log(nbytes / sizes[0]) / math.log(sizes[-1] / sizes[0])
