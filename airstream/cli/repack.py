"""`airstream repack MODEL OUT`: the checkpoint written anew, each layer one run of bytes, or just some layers of it."""

from __future__ import annotations

import argparse
import shlex

from airstream.cli.notes import note, program
from airstream.cli.options import source_options
from airstream.repacking.repack import repack_and_report


def run(arguments: argparse.Namespace) -> None:
    """Repack, print where the result is, and say what was written and what to type next."""
    what = {"layers": arguments.layers, "shard_size": arguments.shard_size, "codec": arguments.codec}
    report = repack_and_report(arguments.model, arguments.out, **what, **source_options(arguments))
    print(report.folder)
    note(f"{report}\nNext, prove it whole:\n  {shlex.join([program(), 'verify', str(report.folder)])}")
