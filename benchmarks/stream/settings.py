"""What `benchmarks.stream` is asked to do: the command line, which the program and the processes of its turns share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(argv: Sequence[str], description: str | None = None) -> argparse.Namespace:
    """The command line, checked; ends with a message where it makes no sense."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.stream", description=description, formatter_class=formatter)
    parser.add_argument("--checkpoint", required=True, type=lambda text: str(Path(text).absolute()))
    parser.add_argument("--limit-mib", type=int, help="memory of every turn, page cache included")
    parser.add_argument("--max-memory", default="1100MiB", help="what airstream is told (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--page-cache", action="store_true", help="read through the page cache")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=8)
    return parser.parse_args(argv)
