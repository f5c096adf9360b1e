"""`airstream cache`: which packed copies `compression=` keeps in the cache folder; `--clear` removes them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from airstream.cli.notes import note
from airstream.repacking.kept import Copy, chosen, copies, remove
from airstream.reporting.units import counted, format_bytes
from airstream.system.in_use import packed_folder


def run(arguments: argparse.Namespace) -> int:
    """List the copies, or remove some. Returns the exit status: 1 if one that was to be removed is in use."""
    there = copies()
    if arguments.clear is None:
        _list(there, arguments.json)
        return 0
    wanted = chosen(arguments.clear, there) if arguments.clear else there
    removed = [copy for copy in wanted if _tell(copy, remove(copy))]
    freed = format_bytes(sum(copy.nbytes for copy in removed))
    note(f"{counted(len(removed), 'packed checkpoint')} removed, {freed}")
    return 0 if len(removed) == len(wanted) else 1


def _tell(copy: Copy, is_removed: bool) -> bool:
    if not is_removed:
        note(f"{copy.name} is in use, and stays: end what uses it first")
    elif copy.folder.exists():
        note(f"{copy.folder} has files that are not of the copy: they stay")
    if is_removed:
        print(copy.name)
    return is_removed


def _list(there: Sequence[Copy], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(copy) | {"folder": str(copy.folder)} for copy in there]))
        return
    rows = [("SIZE", "CODEC", "LAST USE", "MODEL", "NAME")]
    for copy in there:
        used = f"{datetime.fromtimestamp(copy.last_use):%Y-%m-%d %H:%M}"
        state = "" if copy.state == "whole" else f" ({copy.state})"
        rows.append((format_bytes(copy.nbytes), copy.codec, used, copy.model, f"{copy.name}{state}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if there:
        for row in rows:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    total = format_bytes(sum(copy.nbytes for copy in there))
    note(f"{counted(len(there), 'packed checkpoint')}, {total}, in {packed_folder()}")
    if there:
        note("(`airstream cache --clear NAME` removes one, and `--clear` alone all that nobody uses)")
