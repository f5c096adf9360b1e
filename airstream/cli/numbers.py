"""Numbers of the command line and where they may lie: a mistake is told before anything is imported."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def number(
    kind: type[int] | type[float],
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Callable[[str], int | float]:
    """What makes a number of an argument, for `add_argument(type=...)`, and refuses one that is out of range."""
    bounds = {"at least": at_least, "above": above, "at most": at_most}
    wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    noun = "whole number" if kind is int else "number"

    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        too_small = (at_least is not None and value < at_least) or (above is not None and value <= above)
        if not math.isfinite(value) or too_small or (at_most is not None and value > at_most):
            raise argparse.ArgumentTypeError(f"{text} must be a {noun} {wanted}")
        return value

    return convert
