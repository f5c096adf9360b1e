"""These are the arguments of `from_pretrained` and its neighbours among those of the command line."""

from __future__ import annotations

import argparse
from typing import Any

from airstream.cli.values import parse_memory
from airstream.loading.options import SOURCE_OPTIONS


def load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `from_pretrained` among those of the command line; those not given are left to its defaults."""
    names = (
        "dtype", "device", "max_context", "max_batch_size", "layers_per_batch", "prefetch_batches", "page_cache",
        "attn_implementation", "compression", "kernels", *SOURCE_OPTIONS,
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    if arguments.max_memory:
        options["max_memory"] = parse_memory(arguments.max_memory)
    return options


def source_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where a checkpoint comes from, among the arguments of the command line."""
    given = ((name, getattr(arguments, name)) for name in SOURCE_OPTIONS)
    return {name: value for name, value in given if value is not None}
