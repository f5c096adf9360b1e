"""This guesses what was meant by a name that is not there, from those that are. It knows spelling, and no more."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from airstream.reporting.kinds import what_lies

LEAST_ALIKE = 0.7
"""Of 1, which is the same word: what is less alike is another word, not a slip."""

MAX_LOOKED_AT = 1000
"""Names in a folder that are compared: it is not looked through for long because somebody has mistyped."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is written most like `name`, whatever the case; None if none is."""
    by_key = {_key(each): each for each in known}
    close = difflib.get_close_matches(_key(name), by_key, n=1, cutoff=LEAST_ALIKE)
    return by_key[close[0]] if close else None


def meant_path(name: str) -> str:
    """A sentence with the folder or GGUF file that `name`, which leads to none, may mean; nothing if none is alike.

    If it is inside a file, the sentence says that.
    """
    try:
        if lies := what_lies(Path(name).expanduser()):
            return f". It is {lies}"
        path = Path(name).expanduser()
        with os.scandir(path.parent) as entries:
            names = [each.name for each in islice(entries, MAX_LOOKED_AT) if each.is_dir() or each.name[-5:] == ".gguf"]
    except (OSError, ValueError, RuntimeError):  # there is no such parent, or nothing can be called that
        return ""
    found = nearest(path.name, names)
    if found is None:
        return ""
    meant = str(path.with_name(found))
    return f". Did you mean {meant if len(path.parts) > 1 else f'./{meant}'!r}?"


def _key(name: str) -> str:
    return name.lower().replace("_", "-")
