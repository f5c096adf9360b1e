"""This draws a profile: a lane for each link over the latest passes, and where each second went."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from airstream.profiling.costs import COMPUTE, PYTHON, ROWS, SCHEDULING, STALL, Costs
from airstream.profiling.intervals import merge
from airstream.profiling.profile_data import PassProfile, ProfileData
from airstream.reporting.figure import check_file, new_figure, save_figure
from airstream.reporting.paths import path_of
from airstream.reporting.probe import LINKS, Span
from airstream.reporting.units import format_seconds

NUM_PASSES = 3
"""Passes in the swimlanes, the latest: of decoding, if there were any; beside a prompt's they could not be seen."""

STYLES: dict[str, dict[str, Any]] = {
    COMPUTE: {"facecolor": "#1b3a5c"},
    STALL: {"facecolor": "#ffffff", "hatch": "////"},
    PYTHON: {"facecolor": "#f2c14e"},
    "disk": {"facecolor": "#2a9d8f"},
    "H2D": {"facecolor": "#8fc1e3"},
    "host copy": {"facecolor": "#b5b5b5"},
    "convert": {"facecolor": "#7a4f8b"},
}
"""From dark to light, and one of them hatched: they differ without colours too."""

HATCHES = {ROWS: "....", SCHEDULING: "xxxx"}
"""Of stalls that no link is to blame for; all others are hatched alike, in the colour of the link."""

EDGE = "#333333"

WAITS = (
    "hatched or dotted: computation waits, for the link of that colour if it has one; white between: nothing is done"
)

MIN_SHARE = 0.002
"""Of a bar: what is smaller cannot be seen, and is left out of the legend."""


def draw(profile: ProfileData, file: str | os.PathLike[str] | None = None) -> Any:
    """The picture, written to `file` if one is given. See `Profile.plot`."""
    figure = new_figure(9, 5.4)
    if file is not None:
        file = path_of("file", file)
        check_file(figure, file)
    lanes, seconds = figure.subplots(2, 1, height_ratios=(3, 1.4))
    _draw_lanes(lanes, profile)
    _draw_seconds(seconds, profile)
    figure.suptitle(f"{Path(profile.model).name} on {profile.device}, {profile.dtype}", fontsize=11)
    if file is not None:
        save_figure(figure, file)
    return figure


def _draw_lanes(axes: Any, profile: ProfileData) -> None:
    passes = _latest(profile.passes)
    begin = passes[0].start if passes else 0.0
    end = passes[-1].start + passes[-1].costs.wall_seconds if passes else 1.0
    spans = [
        span._replace(start=span.start - profile.started, end=span.end - profile.started) for span in profile.spans
    ]
    spans = [span for span in spans if span.end > begin and span.start < end and span.kind in STYLES]
    rows = sorted({_lane(span) for span in spans}, key=_order)
    for row, name in enumerate(rows):
        lane = sorted((span for span in spans if _lane(span) == name), key=lambda span: span.kind)
        for kind, group in itertools.groupby(lane, key=lambda span: span.kind):
            _draw_spans(axes, row, kind, group, begin)
    for each in passes:
        axes.axvline(each.start - begin, color=EDGE, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(end - begin, 1e-9))
    which = f"{len(passes)} passes, which begin at the dotted lines" if len(passes) > 1 else "pass"
    axes.set_xlabel(f"seconds of the latest {which}")


def _latest(passes: Sequence[PassProfile]) -> Sequence[PassProfile]:
    """The last few passes of the phase that was last, decoding if it was any."""
    last = passes[-NUM_PASSES:]
    after_prefill = next((number for number, each in enumerate(reversed(last)) if each.phase != "decode"), len(last))
    return last[len(last) - after_prefill :] or last[-1:]


def _draw_spans(axes: Any, row: int, kind: str, spans: Iterable[Span], begin: float) -> None:
    bars = [(start - begin, end - start) for start, end in merge((span.start, span.end) for span in spans)]
    style = STYLES[kind]
    line = {"edgecolor": EDGE, "linewidth": 0.4} if kind == STALL else {"linewidth": 0}
    axes.broken_barh(bars, (row - 0.36, 0.72), **style, **line)


def _lane(span: Span) -> str:
    return span.track.removesuffix(" stream") if span.track.endswith(" stream") else span.track.replace("-", " ")


def _order(lane: str) -> tuple[int, str]:
    known = [COMPUTE, PYTHON, *LINKS]
    return (known.index(lane) if lane in known else len(known), lane)


def _draw_seconds(axes: Any, profile: ProfileData) -> None:
    bars = [(name, costs) for name, costs in (("decode", profile.decode), ("prefill", profile.prefill)) if costs.passes]
    labelled: set[str] = set()
    for row, (_, costs) in enumerate(bars):
        left = 0.0
        for label, seconds, style in _parts(costs):
            share = seconds / costs.wall_seconds if costs.wall_seconds else 0.0
            if share < MIN_SHARE:
                continue
            legend = {} if label in labelled else {"label": label}
            axes.barh(row, share, left=left, height=0.6, edgecolor=EDGE, linewidth=0.5, **style, **legend)
            if share > 0.06:
                frame = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"}
                text = format_seconds(seconds / costs.passes)
                axes.text(left + share / 2, row, text, ha="center", va="center", fontsize=8, bbox=frame)
            labelled.add(label)
            left += share
    axes.set_yticks(range(len(bars)), [f"a {name} pass" for name, _ in bars])
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("where each second went")
    if labelled:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.45),
            ncols=5,
            fontsize=8,
            frameon=False,
            title=WAITS,
            title_fontsize=8,
        )


def _parts(costs: Costs) -> Sequence[tuple[str, float, dict[str, Any]]]:
    stalls = sorted(costs.stalls.items(), key=lambda item: -item[1])
    waits = [(f"stall: {cause}", seconds, _stall_style(cause)) for cause, seconds in stalls]
    return [
        ("compute", costs.compute_seconds, STYLES[COMPUTE]),
        *waits,
        ("sampling and Python", costs.python_seconds, STYLES[PYTHON]),
    ]


def _stall_style(cause: str) -> dict[str, Any]:
    return {"facecolor": STYLES.get(cause, {}).get("facecolor", "#ffffff"), "hatch": HATCHES.get(cause, "////")}
