"""A report says what a repack has made, for whoever has to be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from airstream.reporting.units import counted, format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class RepackReport:
    """The result of a repack. Printed, it is one sentence about what was written and what was there before.

    Attributes:
        folder: the repacked checkpoint.
        num_files: the files of weights.
        num_bytes: the bytes of these files.
        kept_files: of them, how many a run before had finished.
        is_old: all of it was there already, and nothing was written.
        seconds: it took.
        packs_nothing: it was to be packed, and has nothing that can be.
    """

    folder: Path
    num_files: int
    num_bytes: int
    kept_files: int
    is_old: bool
    seconds: float
    packs_nothing: bool = False

    def __str__(self) -> str:
        weights = f"{counted(self.num_files, 'file')} of weights, {format_bytes(self.num_bytes)}"
        if self.packs_nothing:
            weights += " (as they were: only bfloat16 that is not packed yet can be)"
        if self.is_old:
            return f"{self.folder} is this repack already ({weights}): nothing was written"
        kept = f"; {self.kept_files:,} of them a run before had finished" if self.kept_files else ""
        return f"{weights}, in {format_seconds(self.seconds)}{kept}"
