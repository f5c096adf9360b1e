"""The command line: `airstream demo | generate | chat | plan | ...`. Parses, calls, prints; decides nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from airstream.cli.parser import build_parser
from airstream.errors import AirstreamError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for an error that is ours to explain, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except AirstreamError as error:
        print(f"airstream: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: `airstream generate ... | head`
        sys.stderr.close()
        return 1
