"""The command line parses `airstream demo | generate | chat | plan | ...`, calls and prints; it decides nothing.

It refuses to know how a model runs: it calls what every user can call, asks before weights are read whether there will
be text, and looks at the engine for the status line alone. Read `parser` first, then `values` and `mistakes`, which
refuse what cannot be meant, and `slips`, which guesses what was, then the module that has the name of a command;
`session` is what those that generate text share.
"""

from __future__ import annotations

import codecs
import locale
import os
import sys
import warnings
from collections.abc import Sequence

from airstream import __version__
from airstream.cli.output import able_to_write, finish, is_lost
from airstream.cli.parser import build_parser
from airstream.cli.wording import as_options
from airstream.errors import AirstreamError

__all__ = ["main"]

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""What keeps the libraries below from telling users of a command what only who programs them can change."""


NOT_UTF8 = "this locale's encoding is {}, in which a library cannot read its own files ({}): set PYTHONUTF8=1"

MAX_ERROR = 500
"""Characters of what another library says of its error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for an error, which is told in one line, 130 after Ctrl-C."""
    with able_to_write():
        if sys.stdout is None:
            print("airstream: standard output is closed: nothing could be shown", file=sys.stderr)
            return 1
        try:
            exit_status = _run(argv)
        except SystemExit:  # the parser has printed something
            if not finish():
                return 1
            raise
        return exit_status if finish() else 1


def _run(argv: Sequence[str] | None) -> int:
    arguments = build_parser(__version__).parse_args(argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)  # before they are imported: that is when they look
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            return arguments.run(arguments) or 0
    except AirstreamError as error:
        print(f"airstream: {as_options(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:  # whatever the libraries below raise is a line, too
        if isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and is_lost()):
            return 1  # `finish` tells
        if arguments.traceback:
            raise
        if isinstance(error, UnicodeDecodeError) and _encoding() != "utf-8":
            print(f"airstream: {NOT_UTF8.format(_encoding(), error)}", file=sys.stderr)
            return 1
        said = " ".join(str(error).split()) or "no message"
        what = f"airstream: {type(error).__name__}: {said[:MAX_ERROR]}"
        print(f"{what} (`airstream --traceback ...` shows where)", file=sys.stderr)
        return 1


def _encoding() -> str:
    """What text files are read as by those who name no encoding."""
    return codecs.lookup(locale.getpreferredencoding(do_setlocale=False)).name
