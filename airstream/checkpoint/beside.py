"""This looks at the small files beside weights (tokenizer, processor, chat template) before transformers reads them.

It knows their names and how large they get. It refuses to know what is in them: a pass over their bytes says whether
reading them would cost more than it ever does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from airstream.checkpoint.config_file import check_types
from airstream.errors import CheckpointError, CheckpointNotFoundError
from airstream.reporting.units import counted
from airstream.system.foreign_files import open_regular, read_regular
from airstream.system.foreign_json import CONFIG, Kind, check_json, read_json
from airstream.system.impostors import HEAD_BYTES, LFS_POINTER, complaint

VOCABULARY = Kind("a tokenizer", 640 << 20)
"""The largest has 33 MB, 262,000 entries and twice as many merges. transformers' own reader takes as much."""

SETTINGS = Kind(CONFIG.name, 96 << 20)
"""Some list thousands of tokens."""

KINDS: Mapping[re.Pattern[str], Kind] = {
    re.compile(r"(tokenizer|vocab|tekken|.*_vocab)\.json"): VOCABULARY,
    re.compile(r".*(token|processor|template|config).*\.json"): SETTINGS,
}
"""Files of JSON that transformers reads, by their names; the first that fits counts."""

FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "tokenizer_config.json": {"model_max_length": (int, float)},
    "processor_config.json": dict.fromkeys(("image_processor", "feature_extractor", "video_processor"), (dict,)),
    "preprocessor_config.json": {},
    "video_preprocessor_config.json": {},
    "chat_template.json": {"chat_template": (str,)},
}
"""By file, what a value is where transformers fails with another one and names neither, or fails later: a tokenizer
compares the length of every text with its own, whatever that is."""

NEEDED = {"chat_template.json": "chat_template"}
"""What a file is for."""

TEMPLATE, MORE_TEMPLATES = ".jinja", "additional_chat_templates"
"""How the names of templates end, and the folder of those that are not the first."""

OTHERS = (".model", ".txt", TEMPLATE, ".tiktoken", ".spm", ".bpe")
"""How the names of its other files end."""

OF_TOKENIZERS = ("*token*", "vocab*", "*.model", "*.gguf", "*.py")
"""One of these is there where a tokenizer is."""

MAX_BYTES, MAX_TEMPLATE_BYTES = 64 << 20, 1 << 20
"""Of these, and of a chat template, which is text that somebody wrote: the longest has 30 KB."""


def has_tokenizer(folder: Path) -> bool:
    """Whether there is anything in `folder` of which a tokenizer could be made."""
    return any(any(folder.glob(pattern)) for pattern in OF_TOKENIZERS)


def without_tokenizer(folder: Path) -> CheckpointNotFoundError | None:
    """What to say of a folder in which nothing is of a tokenizer; None if there is, and something else is wrong."""
    if not folder.is_dir() or has_tokenizer(folder):
        return None
    return CheckpointNotFoundError(
        f"{folder} has no tokenizer beside its weights: copy tokenizer.json and tokenizer_config.json into it from "
        "where the model comes from, or save one with tokenizer.save_pretrained(...)"
    )


def check_small_files(folder: Path) -> None:
    """Refuse whatever in `folder` no tokenizer or processor can be made of, before that is tried.

    Raises:
        CheckpointError: the message names the file.
    """
    for file in sorted((*folder.iterdir(), *(folder / MORE_TEMPLATES).glob(f"*{TEMPLATE}"))):
        kind = next((kind for pattern, kind in KINDS.items() if pattern.fullmatch(file.name)), None)
        if file.is_dir() and file.suffix not in (".json", TEMPLATE):
            continue
        if kind is not None:
            _check_json(file, kind)
            if file.name in FIELDS:
                _check_fields(file)
        elif file.suffix in OTHERS:
            _check_other(file)


def _check_json(file: Path, kind: Kind) -> None:
    raw = read_regular(file, kind.max_bytes, kind.name)
    if raw.lstrip()[:1] not in (b"{", b"[") and (said := complaint(file, raw[:HEAD_BYTES], "")):
        raise CheckpointError(said)
    try:
        check_json(raw, kind)
    except ValueError as error:
        raise CheckpointError(f"{file} is not {kind.name}: {error}. Download it again") from None


def _check_fields(file: Path) -> None:
    """Refuse `file` unless it is an object whose values are of the types of `FIELDS`."""
    values = read_json(file, SETTINGS)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object. Download it again")
    check_types(file, values, FIELDS[file.name])
    needed = NEEDED.get(file.name)
    if needed is not None and values.get(needed) is None:
        raise CheckpointError(f"{file} has no {needed}, which is all that it is for. Download it again, or remove it")


def _check_other(file: Path) -> None:
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(HEAD_BYTES)
    most = MAX_TEMPLATE_BYTES if file.suffix == TEMPLATE else MAX_BYTES
    if size > most:
        raise CheckpointError(
            f"{file} has {counted(size, 'byte')}: it is nothing of a tokenizer, which has {most:,} at most"
        )
    if file.suffix == TEMPLATE:
        _check_text(file, most)
    if head.startswith(LFS_POINTER):  # all else may be what it should be: text
        raise CheckpointError(str(complaint(file, head, "")))


def _check_text(file: Path, max_bytes: int) -> None:
    try:
        read_regular(file, max_bytes, "a chat template").decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 at byte {error.start:,}. Download it again") from None
