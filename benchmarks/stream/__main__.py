r"""How close streaming comes to the disk: airstream alone, against the raw link measured in the same run.

    python -m benchmarks.stream --checkpoint DIR [--limit-mib 3000] [--max-memory 1100MiB] [--turns 3]

Every turn is a process of its own: in a memory cgroup with a cold page cache if `--limit-mib` is given (needs root).
It measures the raw link (the same reader over the same layer batches, without computing), loads the model, generates,
and measures the raw link again. Prints a table and, as the last line, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.launch import execute
from benchmarks.stream.settings import parse

ROWS = {
    "seconds_per_token": "s/token, first pass included",
    "decode_seconds_per_token": "s/token after the first",
    "ttft_seconds": "seconds to first token, from from_pretrained on",
    "ttft_passes": "... in passes over the weights at the raw link",
    "streamed_bytes": "bytes streamed",
    "decode_gb_per_second": "GB/s while decoding",
    "link_gb_per_second": "GB/s of the raw link, before and after",
    "link_share": "share of the raw link",
    "stall_seconds": "seconds stalled",
    "peak_rise_bytes": "peak rise of memory, bytes",
    "planned_peak_bytes": "planned peak, bytes",
    "budget_bytes": "budget, bytes",
    "peak_rss_bytes": "peak of the whole process, bytes",
}


def run_turn(arguments: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """One turn in a process of its own, inside the limit.

    Raises:
        RuntimeError: it failed; the message has its last words.
    """
    command = [sys.executable, "-m", "benchmarks.stream.child", *argv]
    outcome, stdout, stderr = execute(command, timeout_seconds=None, limit_mib=arguments.limit_mib)
    if not outcome.is_success:
        raise RuntimeError(f"the run failed ({outcome}): {stderr[-2000:]}")
    record: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return record


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Median, minimum and maximum of every figure over the turns, as Markdown."""
    lines = ["| | median | min | max |", "|---|---|---|---|"]
    for key, label in ROWS.items():
        values = [record[key] for record in records]
        cells = (statistics.median(values), min(values), max(values))
        lines.append(f"| {label} | " + " | ".join(_number(value) for value in cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure `--turns` times and print the table and the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv, __doc__)
    records = []
    for turn in range(arguments.turns):
        print(f"turn {turn + 1} of {arguments.turns}", file=sys.stderr, flush=True)
        records.append(run_turn(arguments, argv))
    print(table(records))
    medians = {key: statistics.median(record[key] for record in records) for key in ROWS}
    settings = {key: value for key, value in vars(arguments).items() if key != "checkpoint"}
    print(json.dumps({"settings": settings, "machine": _machine(), "median": medians, "turns": records}))


def _machine() -> dict[str, Any]:
    import torch

    from benchmarks.conditions import describe_machine

    return {**describe_machine(), "torch": torch.__version__}


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    main()
