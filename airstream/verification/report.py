"""A report says what was found wrong with a checkpoint, and how far anybody looked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from airstream.reporting.units import counted, format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of `airstream.verify`. Printed, it has a line for every fault, and one about what was checked.

    Attributes:
        folder: where the checkpoint lies.
        gguf: the GGUF file that it is, or the first of several; None for one of other files.
        faults: what is wrong, in words; each names the file or the tensor.
        notes: what could not be checked, or is odd without being wrong.
        num_files: files of weights whose headers are right.
        num_tensors: in them.
        checked_files: files, small ones included, whose checksums were known and have been compared.
        read_bytes: read from the disk.
        values_scanned: every weight was looked at, for NaN and infinite values.
        seconds: it took.
    """

    folder: Path
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    num_files: int
    num_tensors: int
    checked_files: int
    read_bytes: int
    values_scanned: bool
    seconds: float
    gguf: Path | None = None

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> str:
        """Everything, as one JSON object."""
        return json.dumps({"is_sound": self.is_sound, **asdict(self)}, indent=2, default=str)

    def __str__(self) -> str:
        verdict = "sound" if self.is_sound else counted(len(self.faults), "fault")
        summary = (
            f"{self.gguf or self.folder}: {verdict}; "
            f"{counted(self.num_tensors, 'tensor')} in {counted(self.num_files, 'file')}, "
            f"{counted(self.checked_files, 'checksum')} compared, {format_bytes(self.read_bytes)} read"
            f"{', every value looked at' if self.values_scanned else ''} in {format_seconds(self.seconds)}"
        )
        return "\n".join([*self.faults, *(f"note: {note}" for note in self.notes), summary])
