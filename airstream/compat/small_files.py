"""This finds the small file beside weights, and the field of it, that no tokenizer or processor can be made with.

transformers reads half a dozen of them and names none. Once it has failed, it is asked again for a folder of links in
which one file is another one. It runs nothing that is not run anyway, and little of that: see `suspects`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from airstream.checkpoint.beside import SETTINGS
from airstream.compat.blame import told
from airstream.compat.suspects import advice
from airstream.errors import CheckpointError
from airstream.system.foreign_json import read_json

VOCABULARY = "tokenizer.json"
FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def small_file_at_fault(folder: Path, load: Callable[[Path], object], _: str) -> str:
    """Words that name the file and the field that the error of `load(folder)` comes of; "" if none is found."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # tokenizers takes no other paths
        return " - which comes of the folder's name, which is not UTF-8: rename it"
    if fault := _fault_of_vocabulary(folder / VOCABULARY):
        return fault
    for file in (folder / name for name in FILES):
        values = _read(file)
        if values and (found := advice(values, {}, partial(_load_with, file, load))):
            return f"{found} in {file.name}"
    return ""


def _fault_of_vocabulary(file: Path) -> str:
    if not file.is_file():
        return ""
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # of the one kind that it has
        return f" - which comes of {file.name}: {told(error)}"
    return ""


def _read(file: Path) -> Mapping[str, Any] | None:
    try:
        values = read_json(file, SETTINGS)
    except CheckpointError:
        return None
    return values if isinstance(values, dict) else None


def _load_with(file: Path, load: Callable[[Path], object], values: dict[str, Any]) -> None:
    """`load` the folder of `file` as it would be with other `values` in it."""
    with tempfile.TemporaryDirectory() as made:
        for other in file.parent.iterdir():
            Path(made, other.name).symlink_to(other.absolute())
        Path(made, file.name).unlink()
        Path(made, file.name).write_text(json.dumps(values), encoding="utf-8")
        load(Path(made))
