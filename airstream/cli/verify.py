"""`airstream verify MODEL`: whether a checkpoint is complete and uncorrupted; one line for everything that is not."""

from __future__ import annotations

import argparse

from airstream import verify
from airstream.cli.options import source_options


def run(arguments: argparse.Namespace) -> int:
    """Print every fault, and what was checked. Returns the exit status: 1 if there is a fault."""
    report = verify(arguments.model, deep=arguments.deep, read=not arguments.quick, **source_options(arguments))
    print(report.to_json() if arguments.json else report)
    return 0 if report.is_sound else 1
