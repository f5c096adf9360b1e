"""This notices standard output that cannot be written: the disk that it goes to is full, or its reader went away.

It knows the stream. It refuses to know what is printed. What is left in its buffer is thrown away once that has been
told, so that the interpreter, which tries again when it ends, has nothing to complain about.
"""

from __future__ import annotations

import os
import sys


def is_lost() -> bool:
    """Whether something that has been printed cannot be written."""
    return _failure() is not None


def finish() -> bool:
    """Write what has been printed; False if that is not possible, which is told, unless nobody is there to read it."""
    failure = _failure()
    if failure is None:
        return True
    if not isinstance(failure, BrokenPipeError):  # `airstream generate ... | head` is no mistake
        print(f"airstream: standard output cannot be written: {failure.strerror}", file=sys.stderr)
    _throw_away()
    return False


def _failure() -> OSError | None:
    """What goes wrong when standard output is flushed; it keeps what it could not write, and so goes wrong again."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _throw_away() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.stdout.flush()
