"""What the runs of a comparison add up to: medians, a Markdown table, one JSON object. Pure; measures nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.limited import Outcome
from benchmarks.peers.measure import Record

NUM_ERROR_LINES = 5


@dataclass(frozen=True)
class Run:
    """One attempt of one system: a record, or an error and never nothing."""

    system: str
    turn: int  # from 1; 0 is the preparation
    record: Record | None = None
    error: str | None = None
    outcome: Outcome | None = None  # what the kernel counted; None where no process was started


@dataclass(frozen=True)
class Spread:
    """A quantity over several runs."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        if self.min == self.max:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.min:.2f}-{self.max:.2f})"


@dataclass(frozen=True)
class Reference:
    """The tokens that all others are compared with."""

    system: str
    tokens: list[int]

    def num_equal(self, tokens: Sequence[int]) -> int:
        """How many tokens are equal before the first that is not."""
        pairs = enumerate(zip(self.tokens, tokens, strict=True))
        return next((place for place, (ours, theirs) in pairs if ours != theirs), len(tokens))


METRICS: dict[str, Callable[[Record], float | None]] = {
    "seconds_per_token": lambda record: record.seconds_per_token,
    "decode_seconds_per_token": lambda record: record.decode_seconds_per_token,
    "ttft_seconds": lambda record: record.ttft_seconds,
    "load_seconds": lambda record: record.load_seconds,
    "peak_rss_gb": lambda record: record.peak_rss_bytes / 1e9,
    "read_gb": lambda record: None if record.read_bytes is None else record.read_bytes / 1e9,
    "prepare_seconds": lambda record: record.prepare_seconds,
    "prepare_disk_gb": lambda record: record.prepare_disk_bytes / 1e9,
}
COLUMNS = {
    "s/token": "seconds_per_token",
    "decode s/token": "decode_seconds_per_token",
    "TTFT s": "ttft_seconds",
    "peak RSS GB": "peak_rss_gb",
    "disk read GB": "read_gb",
    "own copy GB": "prepare_disk_gb",
    "its making s": "prepare_seconds",
}


def schedule(systems: Sequence[str], turns: int) -> list[tuple[int, str]]:
    """The runs in order as (turn, system): every system once a turn, each turn starting one system further.

    Disks and clouds have good and bad minutes; alternation spreads them over all systems, and the shift keeps any one
    of them from always running first.
    """
    order = list(systems)
    return [
        (turn, order[(turn - 1 + place) % len(order)]) for turn in range(1, turns + 1) for place in range(len(order))
    ]


def judge(system: str, turn: int, outcome: Outcome, stdout: str, stderr: str) -> Run:
    """Turn what a runner left behind into a run: its record, or the reason why there is none."""
    if outcome.is_success:
        try:
            return Run(system, turn, record=parse_record(stdout), outcome=outcome)
        except ValueError as error:
            return Run(system, turn, error=str(error), outcome=outcome)
    return Run(system, turn, error=describe_failure(outcome, stderr), outcome=outcome)


def parse_record(stdout: str) -> Record:
    """The record on the last line of a runner's output; the lines above are the system's own chatter.

    Raises:
        ValueError: the last line is not a record.
    """
    last = last_lines(stdout, 1)
    try:
        return Record(**json.loads(last))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the last line of output is not a record ({error}): {last[:200]!r}") from error


def last_lines(text: str, count: int) -> str:
    """The last `count` lines that say something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def describe_failure(outcome: Outcome, stderr: str) -> str:
    """How the command ended, and the last it said."""
    said = last_lines(stderr, NUM_ERROR_LINES)
    return f"{_ending(outcome)}: {said}" if said else _ending(outcome)


def _ending(outcome: Outcome) -> str:
    if outcome.is_timeout:
        return f"timed out after {outcome.wall_seconds:.0f} s"
    if outcome.is_out_of_memory:
        return "killed: it needs more memory than the limit"
    if outcome.status < 0:
        return f"ended by signal {-outcome.status}"
    return f"exit status {outcome.status}"


def fallback_reference(runs: Sequence[Run]) -> Reference | None:
    """airstream's own tokens, where the whole model in memory could not say what is right."""
    records = [run.record for run in runs if run.system == "airstream" and run.record is not None]
    return Reference("airstream", records[0].tokens) if records else None


def summarise(runs: Sequence[Run]) -> dict[str, dict[str, Spread]]:
    """Every metric's spread for each system that has at least one record, in order of appearance."""
    summaries: dict[str, dict[str, Spread]] = {}
    for system in dict.fromkeys(run.system for run in runs):
        records = [run.record for run in runs if run.system == system and run.record is not None]
        values = {name: [metric(record) for record in records] for name, metric in METRICS.items()}
        summaries[system] = {
            name: Spread.of([value for value in column if value is not None])
            for name, column in values.items()
            if any(value is not None for value in column)
        }
    return {system: spreads for system, spreads in summaries.items() if spreads}


def markdown_table(runs: Sequence[Run], reference: Reference | None) -> str:
    """One row for each system, median (min-max), and below it every failure in full."""
    summaries = summarise(runs)
    header = ["system", *COLUMNS, f"tokens equal to {reference.system}'s" if reference else "tokens equal"]
    rows = [header, ["---"] * len(header)]
    for system in dict.fromkeys(run.system for run in runs):
        cells = [str(summaries.get(system, {}).get(metric, "-")) for metric in COLUMNS.values()]
        if system not in summaries:
            cells[0] = "failed"
        rows.append([system, *cells, describe_tokens(system, runs, reference)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    failures = [f"* {run.system}, turn {run.turn}: {' / '.join(run.error.splitlines())}" for run in runs if run.error]
    return "\n\n".join([table, "\n".join(failures)]) if failures else table


def describe_tokens(system: str, runs: Sequence[Run], reference: Reference | None) -> str:
    """`yes`, or `no` with how many tokens agree before the first difference, or `-` where that is not known."""
    records = [run.record for run in runs if run.system == system and run.record is not None]
    if reference is None or not records:
        return "-"
    equal = min(reference.num_equal(record.tokens) for record in records)
    total = len(reference.tokens)
    return "yes" if equal == total else f"no (first {equal} of {total})"


def progress_line(number: int, total: int, run: Run) -> str:
    """One line for whoever waits."""
    if run.record is None:
        said = f"FAILED, {' / '.join((run.error or '').splitlines())}"
    else:
        said = f"{run.record.seconds_per_token:.2f} s/token, TTFT {run.record.ttft_seconds:.1f} s"
    wall = f" [{run.outcome.wall_seconds:.0f} s]" if run.outcome else ""
    return f"[{number}/{total}] turn {run.turn} {run.system}: {said}{wall}"


def as_json(context: dict[str, Any], runs: Sequence[Run], reference: Reference | None) -> dict[str, Any]:
    """Everything, ready for `json.dumps`: the context as it is, the reference, every run and the medians."""
    return context | {
        "reference": asdict(reference) if reference else None,
        "tokens_equal": {run.system: describe_tokens(run.system, runs, reference) for run in runs},
        "medians": {
            system: {name: asdict(spread) for name, spread in spreads.items()}
            for system, spreads in summarise(runs).items()
        },
        "runs": [asdict(run) for run in runs],
    }
