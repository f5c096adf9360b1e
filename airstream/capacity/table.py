"""This writes the table for people and programs, as text, Markdown, CSV or JSON.

It knows rows. It refuses to know where they come from.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from airstream.capacity.rows import Row
from airstream.reporting.units import GIB, counted, format_bytes, format_seconds

__all__ = ["FORMATS", "Table", "as_csv", "as_json", "as_markdown", "as_text"]

WIDTH = 100
"""Of text, in columns."""

UNITS = (
    "Sizes are in GiB. KV: the cache for that context; needs: to hold all of it in VRAM. Shares are of the weights: "
    "what is in neither stays on disk."
)

OF_A_CARD: Mapping[str, Callable[[Row], str]] = {
    "card": lambda row: row.card,
    "VRAM": lambda row: f"{row.vram_bytes / GIB:.0f}",
    "context": lambda row: f"{row.context:,}",
    "KV": lambda row: f"{row.kv_bytes / GIB:.2f}",
    "needs": lambda row: f"{row.needed_bytes / GIB:.1f}",
    "verdict": lambda row: row.verdict if row.least_vram_bytes is None else "",
    "in VRAM": lambda row: _share(row, row.resident_bytes),
    "in RAM": lambda row: _share(row, row.hosted_bytes),
    "a token": lambda row: "" if row.decode_seconds is None else format_seconds(row.decode_seconds),
    "bound by": lambda row: row.bottleneck or "",
}
"""What differs from card to card."""

FLUSH_LEFT = {"card", "verdict", "bound by"}

OF_A_MODEL: Mapping[str, Callable[[Row], str]] = {
    "model": lambda row: row.model,
    "precision": lambda row: row.precision,
    "weights": lambda row: f"{row.weights_bytes / GIB:.1f}",
    "KV / token": lambda row: format_bytes(row.kv_bytes_per_token),
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows, and what they take for granted. Prints as text; the functions below give other formats."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return as_text(self)

    def _repr_markdown_(self) -> str:
        """What notebooks show."""
        return as_markdown(self)


def as_text(table: Table) -> str:
    """For a terminal: a block for each model and precision, then the notes."""
    lines = [[column(row) for column in OF_A_CARD.values()] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(OF_A_CARD, *lines, strict=True)]
    blocks = itertools.groupby(
        zip(table.rows, lines, strict=True), lambda pair: (pair[0].model, pair[0].precision, pair[0].weights_bytes)
    )
    shown = [line for _, block in blocks for line in _block([*block], widths)]
    notes = [textwrap.fill(note, WIDTH, break_on_hyphens=False) for note in (UNITS, *table.notes)]
    return "\n".join([*shown, *notes])


def _block(block: Sequence[tuple[Row, Sequence[str]]], widths: Sequence[int]) -> Iterator[str]:
    first, _ = block[0]
    sequences = f", {counted(first.batch_size, 'sequence')}" if first.batch_size > 1 else ""
    yield (
        f"{first.model}, {first.precision}: {format_bytes(first.weights_bytes)} of weights, "
        f"{format_bytes(first.kv_bytes_per_token)} of KV cache a token{sequences}"
    )
    yield _padded(list(OF_A_CARD), widths)
    for row, cells in block:
        yield _padded(cells, widths) if row.least_vram_bytes is None else _refusal(row, cells, widths)
    yield ""


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if name in FLUSH_LEFT else cell.rjust(width)
        for name, cell, width in zip(OF_A_CARD, cells, widths, strict=False)
    ]
    return "  " + "  ".join(padded).rstrip()


def _refusal(row: Row, cells: Sequence[str], widths: Sequence[int]) -> str:
    """The verdict takes the place of what there is nothing to say about."""
    until = list(OF_A_CARD).index("verdict")
    return f"{_padded(cells[:until], widths[:until])}  {_verdict(row)}"


def _verdict(row: Row) -> str:
    if row.least_vram_bytes is None or row.least_ram_bytes is None:
        return row.verdict
    return f"{row.verdict}: least budgets {row.least_vram_bytes / GIB:.2f} VRAM, {row.least_ram_bytes / GIB:.2f} RAM"


def _share(row: Row, nbytes: int) -> str:

    if row.decode_seconds is None:
        return ""
    return f"{min(1.0, nbytes / row.weights_bytes):.0%}"  # small tensors take more room than they have bytes


def as_markdown(table: Table) -> str:
    """One table for all, sizes in GiB; the notes below it."""
    columns = {**OF_A_MODEL, **OF_A_CARD, "verdict": _verdict}
    rule = [":--" if name in FLUSH_LEFT or name in ("model", "precision") else "--:" for name in columns]
    body = [[column(row) for column in columns.values()] for row in table.rows]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (list(columns), rule, *body)]
    return "\n".join([*lines, "", " ".join([UNITS, *table.notes])])


def as_csv(table: Table) -> str:
    """Plain numbers: bytes and seconds. Nothing where there is none."""
    target = io.StringIO()
    writer = csv.DictWriter(target, [field.name for field in fields(table.rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in table.rows)
    return target.getvalue().rstrip("\n")


def as_json(table: Table) -> str:
    """`{"rows": [...], "notes": [...]}`, in bytes and seconds."""
    return json.dumps(asdict(table))


FORMATS: Mapping[str, Callable[[Table], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "csv": as_csv,
    "json": as_json,
}
