"""The law, as arithmetic: s/token against max(bytes streamed / raw link, compute time of the resident model).

Pure: what was measured in, summaries and tables out. Nothing here measures or imports a large library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.limited import MIB, Outcome
from benchmarks.report import Run, Spread

TOLERANCE = 1.10
STATEMENT = "s/token <= 1.10 x max(bytes streamed / raw link, compute time of the resident model)"


@dataclass(frozen=True)
class Budget:
    """What airstream is told in order to keep a share of the weights in memory."""

    wanted: float
    share: float  # that the plan keeps, of `full_pass_bytes`
    max_memory_bytes: int
    full_pass_bytes: int  # what a pass reads with as little in memory as can be


@dataclass(frozen=True)
class Measured:
    """One run of airstream."""

    tokens: list[int]
    token_seconds: list[float]  # of every token after the first
    pass_bytes: int  # streamed for a token after the first, on average; off by up to a batch over the number of tokens
    planned_pass_bytes: int
    link: list[tuple[int, float]]  # bytes and seconds of streaming without computing, before and after; may be empty
    stall_seconds: float
    predicted_seconds: float | None  # s/token by the plan, before anything was loaded
    assumed_rates: list[str]  # that went into the prediction without having been measured on this machine
    planned_peak_bytes: int
    peak_rise_bytes: int
    is_direct: bool
    version: str

    @property
    def seconds(self) -> float:
        """s/token after the first: the median."""
        return median(self.token_seconds)

    @property
    def is_resident(self) -> bool:
        """Whether nothing was to be streamed."""
        return not self.planned_pass_bytes

    @property
    def link_rate(self) -> float | None:
        """Bytes per second of the raw link; None where nothing is streamed."""
        return sum(part[0] for part in self.link) / sum(part[1] for part in self.link) if self.link else None


@dataclass(frozen=True)
class LawRun:
    """One attempt at one share: a measurement, or an error and never nothing."""

    wanted: float
    turn: int
    measured: Measured | None = None
    error: str | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Cliff:
    """The runs of a peer that maps its weights, by how much of them its memory limit leaves room for."""

    limits_mib: Mapping[float, int]
    overhead_bytes: int  # of the limit, what is not for weights
    weight_bytes: int
    runs: Sequence[Run]  # named by `cliff_name`


def bound_seconds(measured: Measured, compute_seconds: float | None) -> float:
    """What the law allows this run, before its tolerance.

    The bytes are the plan's: exact, and never more than were streamed. What the engine counts between two tokens is off
    by up to a batch, for what was read ahead.
    """
    link_seconds = measured.planned_pass_bytes / measured.link_rate if measured.link_rate else 0.0
    return max(link_seconds, compute_seconds or 0.0)


def compute_seconds(runs: Sequence[LawRun], turn: int | None = None) -> float | None:
    """s/token of the runs that streamed nothing: of `turn`, or of all turns where that has none. None: no such run."""
    resident = [(run.turn, run.measured.seconds) for run in runs if run.measured and run.measured.is_resident]
    values = [seconds for of_turn, seconds in resident if of_turn == turn] or [seconds for _, seconds in resident]
    return median(values) if values else None


def summarise(runs: Sequence[LawRun], budgets: Sequence[Budget]) -> list[dict[str, Any]]:
    """For every share with at least one measurement, what was measured beside what was promised."""
    points = []
    for budget in budgets:
        found = [(run.turn, run.measured) for run in runs if run.wanted == budget.wanted and run.measured is not None]
        if found:
            computes = [compute_seconds(runs, turn) for turn, _ in found]
            points.append(asdict(budget) | _point([measured for _, measured in found], computes))
    return points


def _point(found: Sequence[Measured], computes: Sequence[float | None]) -> dict[str, Any]:
    bounds = [bound_seconds(measured, compute) for measured, compute in zip(found, computes, strict=True)]
    pairs = [(measured, bound) for measured, bound in zip(found, bounds, strict=True) if bound]
    ratio = _spread([measured.seconds / bound for measured, bound in pairs])
    return {
        "pass_bytes": round(median(measured.pass_bytes for measured in found)),
        "planned_pass_bytes": found[0].planned_pass_bytes,
        "seconds_per_token": _spread([measured.seconds for measured in found]),
        "mean_seconds_per_token": _spread([fmean(measured.token_seconds) for measured in found]),
        "link_bytes_per_second": _spread([measured.link_rate for measured in found]),
        "compute_seconds": _spread(computes),
        "bound_seconds": _spread([bound for _, bound in pairs]),
        "ratio": ratio,
        "mean_ratio": _spread([fmean(measured.token_seconds) / bound for measured, bound in pairs]),
        "holds": None if ratio is None else ratio["median"] <= TOLERANCE,
        "predicted_seconds": _spread([measured.predicted_seconds for measured in found]),
        "planned_peak_bytes": found[0].planned_peak_bytes,
        "peak_rise_bytes": _spread([measured.peak_rise_bytes for measured in found]),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median and extremes of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return asdict(Spread.of(known)) if known else None


def cliff_name(share: float) -> str:
    """What a run of the peer with room for `share` of its weights is called."""
    return f"llamacpp {share:.0%}"


def cliff_limits(shares: Sequence[float], overhead_bytes: int, weight_bytes: int, ample_mib: int) -> dict[float, int]:
    """The memory limit in MiB that leaves room for each share of the weights; `ample_mib` for all of them."""
    return {
        share: ample_mib if share >= 1 else -(-round(overhead_bytes + share * weight_bytes) // MIB) for share in shares
    }


def summarise_cliff(cliff: Cliff) -> dict[str, Any]:
    """The limits and what a token took under each."""
    points = []
    for share, limit_mib in cliff.limits_mib.items():
        records = [run.record for run in cliff.runs if run.system == cliff_name(share) and run.record is not None]
        seconds = _spread([record.decode_seconds_per_token for record in records])
        points.append({"share": share, "limit_mib": limit_mib, "seconds_per_token": seconds})
    return {
        "overhead_bytes": cliff.overhead_bytes,
        "weight_bytes": cliff.weight_bytes,
        "points": points,
        "runs": [asdict(run) for run in cliff.runs],
    }


def as_json(
    context: dict[str, Any], runs: Sequence[LawRun], budgets: Sequence[Budget], cliff: Cliff | None
) -> dict[str, Any]:
    """Everything, ready for `json.dumps`."""
    versions = sorted({run.measured.version for run in runs if run.measured})
    return context | {
        "law": STATEMENT,
        "versions": versions,
        "assumed_rates": sorted({rate for run in runs if run.measured for rate in run.measured.assumed_rates}),
        "tokens_equal": len({tuple(run.measured.tokens) for run in runs if run.measured}) <= 1,
        "points": summarise(runs, budgets),
        "llamacpp": None if cliff is None else summarise_cliff(cliff),
        "runs": [asdict(run) for run in runs],
    }


COLUMNS = (
    "weights in memory",
    "max_memory GB",
    "GB read a token",
    "s/token",
    "raw link GB/s",
    "the law's s/token",
    "ratio",
    "predicted s/token",
    "planned peak GB",
    "peak GB",
)


def markdown_table(results: Mapping[str, Any]) -> str:
    """`as_json`'s points as a table, then the peer's, then every failure in full."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(_row, results["points"])]
    parts = ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
    if results["assumed_rates"]:
        parts.append(f"Predicted with rates that were not measured here: {', '.join(results['assumed_rates'])}.")
    if results["llamacpp"]:
        parts.append(_cliff_table(results["llamacpp"]["points"]))
    failures = [
        f"* {run.get('system') or 'airstream {:.0%}'.format(run['wanted'])}, turn {run['turn']}: "
        f"{' / '.join(run['error'].splitlines())}"
        for run in (*results["runs"], *(results["llamacpp"] or {}).get("runs", ()))
        if run["error"]
    ]
    return "\n\n".join([*parts, "\n".join(failures)] if failures else parts)


def _row(point: Mapping[str, Any]) -> list[str]:
    gigabyte = 1e-9
    return [
        f"{point['share']:.1%}",
        f"{point['max_memory_bytes'] * gigabyte:.2f}",
        f"{point['pass_bytes'] * gigabyte:.2f}",
        _cell(point["seconds_per_token"]),
        _cell(point["link_bytes_per_second"], gigabyte),
        _cell(point["bound_seconds"]),
        _cell(point["ratio"]),
        _cell(point["predicted_seconds"]),
        f"{point['planned_peak_bytes'] * gigabyte:.2f}",
        _cell(point["peak_rise_bytes"], gigabyte),
    ]


def _cliff_table(points: Sequence[Mapping[str, Any]]) -> str:
    rows = [("weights that fit", "llama.cpp's limit MiB", "s/token"), ("---",) * 3]
    rows += [(f"{point['share']:.0%}", str(point["limit_mib"]), _cell(point["seconds_per_token"])) for point in points]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(spread: Mapping[str, float] | None, scale: float = 1.0) -> str:
    return "-" if spread is None else str(Spread(*(spread[part] * scale for part in ("median", "min", "max"))))
