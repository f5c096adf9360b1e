"""This reads what a user types: with the keys of a line editor where Python has one, over several lines if asked."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from airstream.cli.values import utf8
from airstream.errors import ArgumentError
from airstream.reporting.units import format_bytes

QUOTES, CONTINUED = '"""', "\\"
PROMPT, MORE = "> ", ". "

MAX_PROMPT = 64 << 20
"""Bytes or characters of a prompt: more than any model takes, and no memory worth speaking of. A device has no end."""


def typed() -> Iterator[str]:
    """Texts from standard input until it ends. On a terminal, Ctrl-C forgets what has been typed of one.

    Three double quotes begin and end a text of several lines, and so does a backslash that ends a line.
    """
    if sys.stdin is None:  # closed by who started this
        return
    _expect_utf8()
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            importlib.import_module("readline")  # from then on `input` edits lines and remembers them
    read = _ask if is_terminal else _next_line
    while True:
        try:
            text = _one_text(read)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(Ctrl-D or /exit ends the chat)", file=sys.stderr)
            continue
        try:
            text = utf8("what was typed", text.strip())
        except ArgumentError as error:  # of this text: the next one may do
            print(f"airstream: {error}", file=sys.stderr)
            continue
        if text:
            yield text


def _one_text(read: Callable[[str], str]) -> str:
    """What the next lines say together. Where they end too early, what there is of them counts."""
    line = read(PROMPT)
    is_quoted = line.lstrip().startswith(QUOTES)
    lines = [line.lstrip().removeprefix(QUOTES) if is_quoted else line]
    size = len(line)
    with suppress(EOFError):
        while not lines[-1].rstrip().endswith(QUOTES) if is_quoted else lines[-1].endswith(CONTINUED):
            if not is_quoted:
                lines[-1] = lines[-1].removesuffix(CONTINUED)
            lines.append(read(MORE))
            size += len(lines[-1])
            _check_size("what was typed", size)
    text = "\n".join(lines)
    return text.rstrip().removesuffix(QUOTES) if is_quoted else text


def _ask(prompt: str) -> str:
    return input(prompt)


def _next_line(_: str) -> str:
    line = sys.stdin.readline(MAX_PROMPT + 1)
    _check_size("a line of standard input", len(line))
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


def prompt_of(words: str | None, file: str | None) -> str:
    """The text to continue: `words`, standard input for "-", or what is in `file`.

    Raises:
        ArgumentError: none is given, or both, or there is no text in it.
    """
    if (words is None) == (file is None):
        raise ArgumentError("give one prompt: a text, -f FILE, or - for standard input")
    if file is not None:
        prompt = _read(file)
    elif words == "-":
        prompt = _piped()
    else:
        prompt = utf8("the prompt", words or "")
    if not prompt:
        raise ArgumentError("the prompt is empty: give some text to continue")
    return prompt


def _read(file: str) -> str:
    try:
        with Path(file).open("rb") as stream:
            there = stream.read(MAX_PROMPT + 1)
        _check_size(f"-f {file}", len(there))
        text = io.TextIOWrapper(io.BytesIO(there), encoding="utf-8").read()
        return text.removesuffix("\n")  # what editors end files with is no text
    except OSError as error:
        raise ArgumentError(f"-f {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"-f {file} is not UTF-8 text: {error}") from error


def _piped() -> str:
    if sys.stdin is None:
        raise ArgumentError("there is no standard input to read the prompt from")
    if sys.stdin.isatty():
        print("(the prompt, please; Ctrl-D on a line of its own ends it)", file=sys.stderr, flush=True)
    _expect_utf8()
    text = sys.stdin.read(MAX_PROMPT + 1)
    _check_size("standard input", len(text))
    return utf8("standard input", text)


def _check_size(what: str, size: int) -> None:
    if size > MAX_PROMPT:
        raise ArgumentError(f"{what} has more than {format_bytes(MAX_PROMPT)}, which no model takes: give less text")


def _expect_utf8() -> None:
    """Read UTF-8 from standard input whatever the locale, as from files; `utf8` is told what is none."""
    stream, wanted = sys.stdin, ("utf-8", "surrogateescape")
    if not isinstance(stream, io.TextIOWrapper) or stream.isatty() or (stream.encoding, stream.errors) == wanted:
        return
    stream.reconfigure(encoding=wanted[0], errors=wanted[1])
