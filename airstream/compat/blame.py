"""This makes one error of ours, which names the file, of whatever transformers raises while it believes a file.

transformers trusts what it reads, and fails in as many ways as that can be wrong: a config gives a KeyError, an
AssertionError or an overflow of the stack, a tokenizer a panic of Rust. Who calls it says which file it believes; here
is what comes of each kind of failure. What Python itself wants to pass (Ctrl-C, an exit) passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from airstream.errors import AirstreamError, CheckpointError, UnsupportedError

Consequences = Sequence[tuple[tuple[type[BaseException], ...], type[AirstreamError]]]
"""Which error of ours comes of which kinds of failure: of the first that fits, and else a CheckpointError."""

NO_PACKAGE: Consequences = (((ImportError,), UnsupportedError),)

MAX_CHARACTERS = 500
"""Of what transformers says: a value of the file may be in it, of any length."""

PANIC = "PanicException"
"""The name of what code in Rust raises where it did not expect to fail. It is not an Exception."""


def no_advice(_: str) -> str:
    """Where there is nothing to add."""
    return ""


@contextmanager
def blamed_on(
    said: str, consequences: Consequences = NO_PACKAGE, advice: Callable[[str], str] = no_advice
) -> Iterator[None]:
    """Whatever fails inside does so because of what some file says.

    Args:
        said: what the message begins with, the file in it.
        advice: what it ends with, given what transformers says.
    """
    try:
        yield
    except AirstreamError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        kind = next((ours for theirs, ours in consequences if isinstance(error, theirs)), CheckpointError)
        words = told(error)
        with suppress(Exception):  # looking for a cause may fail as well, and says nothing then
            words += advice(words)
        raise kind(f"{said}: {words}") from error


def told(error: BaseException) -> str:
    """What `error` says, in one line that tells its kind where the words alone would not."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a value of the file that cannot be printed
        text = ""
    text = text.encode("utf-8", "backslashreplace").decode()
    text = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."
    if isinstance(error, RecursionError):
        return "its values are nested too deeply"
    if isinstance(error, MemoryError):
        return f"its values take more memory than there is ({text or 'MemoryError'})"
    return text if isinstance(error, ValueError | OSError | ImportError) and text else f"{type(error).__name__}: {text}"
