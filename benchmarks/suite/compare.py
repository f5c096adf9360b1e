r"""Compare airstream with its peers on one model that does not fit in memory.

    python -m benchmarks.suite.compare --checkpoint DIR --limit-mib 3000 --turns 3 \
        --systems airstream,airllm,accelerate,llamacpp --venvs FOLDER --work FOLDER --out results.json

Every run is a process of its own in a memory cgroup, with a cold page cache; the systems alternate. Environments, the
checkpoint and each system's one-time preparation are made where they are missing, outside the limit. Prints a Markdown
table and, as the last line, everything as JSON; progress goes to standard error. Needs root, for the cgroup and the
cold cache. What the numbers mean is in README.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import conditions, limited, report
from benchmarks.disk import read_rate
from benchmarks.launch import ensure_checkpoint, prepare, run_system, say
from benchmarks.report import Reference, Run
from benchmarks.settings import Settings, parse_settings
from benchmarks.systems import SYSTEMS


def reference_tokens(settings: Settings) -> Reference | None:
    """The tokens that the whole model in memory gives, without a limit; None where it does not fit in this machine."""
    system = SYSTEMS["transformers"]
    available = conditions.memory_bytes("MemAvailable")
    if available < 1.2 * settings.weight_bytes:
        say(f"no reference: {available / 1e9:.1f} GB of free memory cannot hold the model")
        return None
    error = prepare(system, settings)
    run = Run(system.name, 0, error=error) if error else run_system(system, settings, 0, limit_mib=None)
    if run.record is None:
        say(f"no reference: {run.error}")
        return None
    return Reference(system.name, run.record.tokens)


def run_turns(settings: Settings) -> tuple[list[Run], list[float]]:
    """All runs in order, and the disk's raw bytes per second before the first turn and after each. Blocks for long.

    A system that could not be prepared takes no turn, but its error is among the runs.
    """
    errors = {system.name: prepare(system, settings) for system in settings.systems}
    runs = [Run(name, 0, error=error) for name, error in errors.items() if error]
    for run in runs:
        say(f"{run.system}: {run.error}")
    ready = [name for name, error in errors.items() if not error]
    rates = [read_rate(settings.shards)]
    total = settings.turns * len(ready)
    for number, (turn, name) in enumerate(report.schedule(ready, settings.turns), start=1):
        runs.append(run_system(SYSTEMS[name], settings, turn, settings.limit_mib))
        say(report.progress_line(number, total, runs[-1]))
        if number % len(ready) == 0:
            rates.append(read_rate(settings.shards))
    return runs, rates


def compare(settings: Settings) -> tuple[dict[str, Any], str]:
    """The whole comparison: everything as `report.as_json` has it, and the Markdown table with its caption. Blocks.

    Raises:
        LimitError: memory cannot be limited here, or the page cache not be dropped.
    """
    limited.check_cold() if settings.limit_mib is None else limited.check_limit()
    ensure_checkpoint(settings.checkpoint, settings.shape)
    reference = reference_tokens(settings)
    runs, rates = run_turns(settings)
    reference = reference or report.fallback_reference(runs)
    context = conditions.describe(settings, rates)
    table = f"{conditions.caption(context)}\n\n{report.markdown_table(runs, reference)}\n"
    return report.as_json(context, runs, reference), table


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 1 where memory cannot be limited or no cache dropped, else 0: a peer that fails is a result."""
    settings = parse_settings(__doc__, argv)
    try:
        results, table = compare(settings)
    except limited.LimitError as error:
        say(f"compare: {error}")
        return 1
    if settings.out:
        settings.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    limited.end_when_asked()
    sys.exit(main())
