"""This writes a profile as a trace in Chrome's format, which https://ui.perfetto.dev opens. One track a link.

The format: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any

from airstream.profiling.costs import STALL
from airstream.profiling.profile_data import ProfileData
from airstream.reporting.outputs import written
from airstream.reporting.paths import path_of
from airstream.reporting.probe import Span

PROCESS = 1


def events(profile: ProfileData) -> Iterator[dict[str, Any]]:
    """The events, the names of the tracks first."""
    spans = list(profile.spans)
    tracks = {track: number for number, track in enumerate(sorted({span.track for span in spans}, key=_order))}
    yield _named("process_name", 0, f"{profile.model} on {profile.device}")
    for track, number in tracks.items():
        yield _named("thread_name", number, track)
        yield {"ph": "M", "pid": PROCESS, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}}
    for span in spans:
        yield _slice(span, tracks[span.track], profile.started)
    for second, what, nbytes in list(profile.sizes):
        at = _microseconds(second - profile.started)
        yield {"ph": "C", "pid": PROCESS, "name": what, "ts": at, "args": {"MiB": nbytes / (1 << 20)}}


def save(profile: ProfileData, file: str | os.PathLike[str]) -> None:
    """Write the trace to `file`, whole or not at all.

    Raises:
        ArgumentError: there is no such folder, or it may not be written to, or `file` is no file.
        DiskSpaceError: the disk is full.
    """
    with written(path_of("file", file)) as stream, io.TextIOWrapper(stream, encoding="utf-8") as out:
        json.dump({"traceEvents": list(events(profile)), "displayTimeUnit": "ms"}, out)


def _order(track: str) -> tuple[bool, bool, str]:
    """Computation on top, then Python, the copy stream, and the readers."""
    return track.startswith("reader-"), track.endswith(" stream"), track


def _named(kind: str, number: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": PROCESS, "tid": number, "name": kind, "args": {"name": name}}


def _slice(span: Span, track: int, started: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": PROCESS,
        "tid": track,
        "name": f"wait for {span.name}" if span.kind == STALL else span.name or span.kind,
        "cat": span.kind,
        "ts": _microseconds(span.start - started),
        "dur": _microseconds(span.end - span.start),
        "args": {"bytes": span.nbytes} if span.nbytes else {},
    }


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
