"""This takes from an error of somebody else's what fits into a sentence of ours.

It refuses to know what the error is about: who quotes it says so.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line that says something, without its full stop; the kind of `error`, if none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
