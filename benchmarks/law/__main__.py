r"""The law: what a token costs with more and more of the weights in memory, against what it must cost.

    s/token <= 1.10 x max(bytes streamed / raw link, compute time of the resident model)

    python -m benchmarks.law --checkpoint DIR --turns 3 --out results.json \
        [--llamacpp --venvs FOLDER --work FOLDER] [--plot law.png]

For every share of the weights airstream is told the `max_memory` whose plan keeps about that share, and generates in a
process of its own, with a cold page cache, around the page cache. The raw link is measured in the same process before
and after; the compute time is that of the run of the same turn that keeps everything. The shares alternate within a
turn. `--llamacpp` puts llama.cpp beside it, in a memory cgroup that leaves room for the same share of its mapped
weights; that needs root. Prints Markdown tables and, as the last line, everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import conditions, launch, limited, report
from benchmarks.charts import check_matplotlib
from benchmarks.disk import read_rate
from benchmarks.launch import say
from benchmarks.law import plot
from benchmarks.law import report as law_report
from benchmarks.law.report import Budget, Cliff, LawRun, Measured
from benchmarks.limited import MIB
from benchmarks.report import Run
from benchmarks.settings import Setup, absolute, add_shared_options
from benchmarks.systems import SYSTEMS

LLAMACPP = SYSTEMS["llamacpp"]
AMPLE_BYTES = 2 << 30  # of memory beyond the weights: a limit with that much to spare holds them all


@dataclass(frozen=True, kw_only=True)
class LawSettings(Setup):
    """What to measure."""

    shares: list[float]
    has_llamacpp: bool
    llamacpp_tokens: int
    plot: Path | None

    def child(self, action: str, *arguments: str) -> list[str]:
        """The command line of `benchmarks.law.child`."""
        prompt = ",".join(map(str, self.prompt))
        shared = [f"--checkpoint={self.checkpoint}", f"--prompt={prompt}", f"--tokens={self.num_tokens}"]
        return [sys.executable, "-m", "benchmarks.law.child", action, *shared, *arguments]


def choose_budgets(settings: LawSettings) -> list[Budget]:
    """What to tell airstream for every share.

    Raises:
        RuntimeError: there is no plan; the message has the reason.
    """
    command = settings.child("budgets", f"--shares={','.join(map(str, settings.shares))}")
    outcome, stdout, stderr = launch.execute(command, settings.timeout_seconds)
    if not outcome.is_success:
        raise RuntimeError(f"no budgets: {report.describe_failure(outcome, stderr)}")
    return [Budget(**fields) for fields in json.loads(report.last_lines(stdout, 1))]


def run_airstream(settings: LawSettings, budget: Budget, turn: int) -> LawRun:
    """One measured run. Never raises for what the run does."""
    with suppress(limited.LimitError):  # the conditions say if it is not cold
        limited.check_cold()
    command = settings.child("measure", f"--max-memory={budget.max_memory_bytes}")
    outcome, stdout, stderr = launch.execute(command, settings.timeout_seconds)
    if not outcome.is_success:
        error = report.describe_failure(outcome, stderr)
        return LawRun(budget.wanted, turn, error=error, outcome=outcome)
    fields = json.loads(report.last_lines(stdout, 1))
    return LawRun(budget.wanted, turn, Measured(**fields), outcome=outcome)


def prepare_llamacpp(settings: LawSettings) -> Cliff:
    """Convert the weights, and find out what a run needs beside them, in one that has room for all.

    Raises:
        RuntimeError: llama.cpp does not run here; the message has the reason.
    """
    settings = replace(settings, num_tokens=2)
    if error := launch.prepare(LLAMACPP, settings):
        raise RuntimeError(f"llama.cpp: {error}")
    ample_mib = (settings.weight_bytes + AMPLE_BYTES) // MIB
    run = launch.run_system(LLAMACPP, settings, 0, ample_mib)
    if run.record is None or run.outcome is None:
        raise RuntimeError(f"llama.cpp: {run.error}")
    weight_bytes = run.record.prepare_disk_bytes
    peak = run.outcome.peak_bytes or run.outcome.max_rss_bytes  # an old kernel keeps no peak of a cgroup
    overhead = max(peak - weight_bytes, 0)
    limits = law_report.cliff_limits(settings.shares, overhead, weight_bytes, ample_mib)
    return Cliff(limits, overhead, weight_bytes, ())


def run_llamacpp(settings: LawSettings, share: float, limit_mib: int, turn: int) -> Run:
    """One measured run under a limit."""
    run = launch.run_system(LLAMACPP, replace(settings, num_tokens=settings.llamacpp_tokens), turn, limit_mib)
    return replace(run, system=law_report.cliff_name(share))


def run_turns(
    settings: LawSettings, budgets: Sequence[Budget], cliff: Cliff | None
) -> tuple[list[LawRun], list[Run], list[float]]:
    """All runs in order, airstream's and llama.cpp's, and the disk's raw rates around the turns. Blocks for long."""
    programs: dict[str, Callable[[int], LawRun | Run]] = {}
    for budget in budgets:
        programs[f"airstream {budget.wanted:.0%}"] = partial(run_airstream, settings, budget)
    for share, limit_mib in cliff.limits_mib.items() if cliff else ():
        programs[law_report.cliff_name(share)] = partial(run_llamacpp, settings, share, limit_mib)
    runs: list[LawRun | Run] = []
    rates = [read_rate(settings.shards)]
    for turn, name in report.schedule(list(programs), settings.turns):
        runs.append(programs[name](turn))
        say(progress_line(len(runs), settings.turns * len(programs), name, runs[-1]))
        if len(runs) % len(programs) == 0:
            rates.append(read_rate(settings.shards))
    return [run for run in runs if isinstance(run, LawRun)], [run for run in runs if isinstance(run, Run)], rates


def progress_line(number: int, total: int, name: str, run: LawRun | Run) -> str:
    """One line for whoever waits."""
    found = run.measured if isinstance(run, LawRun) else run.record
    if found is None:
        return f"[{number}/{total}] turn {run.turn} {name}: FAILED, {' / '.join((run.error or '').splitlines())}"
    seconds = found.seconds if isinstance(found, Measured) else found.decode_seconds_per_token
    return f"[{number}/{total}] turn {run.turn} {name}: {seconds:.3f} s/token"


def measure(settings: LawSettings) -> dict[str, Any]:
    """Everything, as `law_report.as_json` has it.

    Raises:
        RuntimeError, LimitError: it cannot even begin; the message has the reason.
    """
    cache_state = conditions.COLD
    try:
        limited.check_cold()
    except limited.LimitError as error:
        if settings.has_llamacpp:
            raise
        say(f"law: {error}")
        cache_state = "page cache as it was; weights are read around it"
    launch.ensure_checkpoint(settings.checkpoint, settings.shape)
    budgets = choose_budgets(settings)
    cliff = prepare_llamacpp(settings) if settings.has_llamacpp else None
    runs, peers, rates = run_turns(settings, budgets, cliff)
    context = conditions.describe_common(settings, rates) | {"turns": settings.turns, "cache_state": cache_state}
    return law_report.as_json(context, runs, budgets, replace(cliff, runs=peers) if cliff else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 1 where that cannot even begin, else 0: a law that does not hold is a result."""
    settings = parse_settings(argv)
    try:
        if settings.plot:
            check_matplotlib()
        results = measure(settings)
    except (RuntimeError, ImportError) as error:
        say(f"law: {error}")
        return 1
    if settings.out:
        settings.out.write_text(json.dumps(results, indent=1) + "\n")
    if settings.plot:
        plot.draw(results, settings.plot)
    print(f"{conditions.caption(results)}\n\n{law_report.markdown_table(results)}\n")
    print(json.dumps(results))
    return 0


def parse_settings(argv: Sequence[str] | None = None) -> LawSettings:
    """The command line as settings; exits with a message where it makes no sense."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.law", description=__doc__, formatter_class=formatter)
    add_shared_options(parser, num_tokens=16, needs_folders=False)
    add = parser.add_argument
    add("--shares", type=parse_shares, default="0,25,50,75,90,100", help="per cent in memory (default: %(default)s)")
    add("--llamacpp", action="store_true", dest="has_llamacpp", help="llama.cpp too (needs root, --venvs and --work)")
    add("--llamacpp-tokens", type=int, default=8, help="its new tokens (default: %(default)s)")
    add("--plot", type=absolute, help="a picture to draw, such as law.png (needs pip install matplotlib)")
    args = parser.parse_args(argv)
    if args.has_llamacpp and not (args.venvs and args.work):
        parser.error("--llamacpp needs --venvs and --work")
    if args.num_tokens < 2 or args.llamacpp_tokens < 2:
        parser.error("the law is about the tokens after the first: ask for 2 or more")
    args.venvs, args.work = args.venvs or Path(), args.work or Path()
    return LawSettings(**vars(args))


def parse_shares(text: str) -> list[float]:
    """`"0,25,100"`, per cent, as shares of 1.

    Raises:
        argparse.ArgumentTypeError: one of them is no number from 0 to 100.
    """
    try:
        shares = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of per cent from 0 to 100")
    return list(dict.fromkeys(shares))


if __name__ == "__main__":
    limited.end_when_asked()
    sys.exit(main())
