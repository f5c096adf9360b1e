"""This notices standard output that cannot be written: the disk that it goes to is full, or its reader went away.

It knows the stream. It refuses to know what is printed. What is left in its buffer is thrown away once that has been
told, so that the interpreter, which tries again when it ends, has nothing to complain about. What the encoding of the
stream lacks is written as its number.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

ESCAPED = "airstream.escaped"
"""What is done about characters that standard output cannot encode, by the name that codecs know it by."""


@contextmanager
def able_to_write() -> Iterator[None]:
    """While this lasts, standard output takes any text, and keeps what could not be written, also if unbuffered.

    Without standard error, what is for it goes nowhere: print would write it to standard output.
    """
    if sys.stderr is None:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere), able_to_write():
            yield
        return
    given = sys.stdout
    if not isinstance(given, io.TextIOWrapper):  # there is none, or a stand-in for it
        yield
        return
    codecs.register_error(ESCAPED, _escape)
    inner = io.BufferedWriter(given.buffer) if isinstance(given.buffer, io.RawIOBase) else given.buffer
    stream = io.TextIOWrapper(inner, given.encoding, ESCAPED, line_buffering=given.line_buffering)
    try:
        with redirect_stdout(stream):
            yield
        stream.flush()
    finally:
        stream.detach()
        if inner is not given.buffer:
            inner.detach()


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file's name that Python has kept as they are; else the number of the character."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    is_byte = 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF
    return codecs.lookup_error("surrogateescape" if is_byte else "backslashreplace")(error)


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
