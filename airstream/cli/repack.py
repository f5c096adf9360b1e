"""`airstream repack MODEL OUT`: the checkpoint written anew, each layer one run of bytes, or just some layers of it."""

from __future__ import annotations

import argparse

from airstream import repack
from airstream.cli.parser import hub_options


def run(arguments: argparse.Namespace) -> None:
    """Repack, and print where the result is."""
    options = hub_options(arguments)
    print(repack(arguments.model, arguments.out, layers=arguments.layers, shard_size=arguments.shard_size, **options))
