"""Running the systems: what a run needs is made where it is missing, and every run is a process of its own.

It knows what is done to one system in one turn. It does not know which systems there are, nor what their numbers mean.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import limited, report
from benchmarks.limited import MIB, Outcome
from benchmarks.report import Run
from benchmarks.settings import Setup
from benchmarks.systems import System, ensure_environment

ROOT = Path(__file__).resolve().parents[1]  # where the runners find `benchmarks` and `airstream`
PREPARE_TIMEOUT_SECONDS = 3600.0


def say(line: str) -> None:
    """Progress: standard output belongs to the result."""
    print(line, file=sys.stderr, flush=True)


def execute(
    command: Sequence[str], timeout_seconds: float | None, limit_mib: int | None = None
) -> tuple[Outcome, str, str]:
    """Run one runner to its end; returns how it ended and what it wrote to standard output and error. Blocks."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        outcome = limited.run(
            command,
            limit_bytes=None if limit_mib is None else limit_mib * MIB,
            timeout_seconds=timeout_seconds,
            stdout=stdout,
            stderr=stderr,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        stdout.seek(0)
        stderr.seek(0)
        return outcome, stdout.read().decode(errors="replace"), stderr.read().decode(errors="replace")


def run_system(system: System, settings: Setup, turn: int, limit_mib: int | None) -> Run:
    """One measured run, with a cold page cache."""
    if limit_mib is None:
        limited.drop_page_cache()
    command = system.command(settings.venvs, "run", settings.request(system).arguments())
    return report.judge(system.name, turn, *execute(command, settings.timeout_seconds, limit_mib))


def prepare(system: System, settings: Setup) -> str | None:
    """Make a system's environment and do its one-time conversion, without a limit. Returns why that failed, if so."""
    say(f"preparing {system.name}")
    try:
        ensure_environment(system, settings.venvs)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"no environment: {error}"
    if not system.needs_preparation:
        return None
    command = system.command(settings.venvs, "prepare", settings.request(system).arguments())
    outcome, _, stderr = execute(command, PREPARE_TIMEOUT_SECONDS)
    return None if outcome.is_success else f"preparation: {report.describe_failure(outcome, stderr)}"


def ensure_checkpoint(checkpoint: Path, shape: str) -> None:
    """Write the checkpoint where the folder is missing, in a process of its own: this one must stay small.

    Raises:
        subprocess.CalledProcessError: writing failed; its own messages went to standard error.
    """
    if not checkpoint.exists():
        say(f"writing a checkpoint of shape {shape} to {checkpoint}")
        command = [sys.executable, "-m", "benchmarks.checkpoints", str(checkpoint), shape]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)
