"""A profile can be printed, drawn, saved as a trace, or made into a table of pandas."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from airstream.errors import UnsupportedError
from airstream.profiling import plot, trace
from airstream.profiling.profile_data import PassProfile, ProfileData
from airstream.profiling.text import describe
from airstream.reporting.probe import LINKS


@dataclass(slots=True, repr=False)
class Profile(ProfileData):
    """What `model.profile()` and `profiling_mode=True` give. `print` shows it."""

    def to_dataframe(self) -> Any:
        """One row a pass, as a `pandas.DataFrame`; seconds and bytes.

        Raises:
            UnsupportedError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UnsupportedError("to_dataframe needs pandas: pip install pandas") from None
        return pandas.DataFrame([dict(_row(each)) for each in self.passes])

    def save_trace(self, file: str | os.PathLike[str]) -> None:
        """Write the spans that are kept for https://ui.perfetto.dev, one track a link. A whole file or none."""
        trace.save(self, file)

    def plot(self, file: str | os.PathLike[str] | None = None) -> Any:
        """Draw the latest passes, a lane for each link, and where each second went: a `matplotlib.figure.Figure`.

        Raises:
            UnsupportedError: matplotlib is not installed.
            ArgumentError: `file` has an ending that matplotlib does not know, or its folder is missing.
        """
        return plot.draw(self, file)

    def __str__(self) -> str:
        return describe(self)


def _row(profiled: PassProfile) -> Iterator[tuple[str, Any]]:
    costs = profiled.costs
    yield from ((name, getattr(profiled, name)) for name in ("number", "phase", "batch_size", "start", "is_complete"))
    yield from ((name, value) for name, value in costs.to_dict().items() if name not in ("stalls", "links", "passes"))
    yield from ((f"stall: {cause}", seconds) for cause, seconds in costs.stalls.items())
    used = [(link, costs.links[link]) for link in LINKS]
    yield from chain.from_iterable(
        ((f"{link}: seconds", use.seconds), (f"{link}: bytes", use.nbytes)) for link, use in used
    )
