"""This measures JSON that others wrote before Python's parser sees it, and refuses it if it would cost too much.

Ten bytes of text can become a hundred in memory, digits take quadratic time, and nesting takes the stack of whoever
walks it. So depth, digits, the number of values and the memory they take are bounded here, by one pass over the bytes.
It knows nothing of what the values mean.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from airstream.errors import CheckpointError
from airstream.reporting.units import counted
from airstream.system.foreign_files import read_regular
from airstream.system.impostors import HEAD_BYTES, complaint

MAX_DEPTH = 32
"""Of lists and objects in each other. Configs have eight or so."""

MAX_DIGITS = 100
"""In a row. What people write has twenty; a float written out in full has fifty-odd."""

VALUE_BYTES = 96
"""What Python takes for a value at most, an object of one key being the worst, beside its text."""

COPIES_OF_TEXT, COPIES_OF_WIDE_TEXT = 3, 9
"""Bytes that one byte of text takes at most: raw, decoded, and in a value; decoded text has four bytes for each letter
if one of them is no letter of Europe."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file of JSON is, and the memory that one may take."""

    name: str
    parsed_bytes: int

    @property
    def max_bytes(self) -> int:
        """The bytes of text that a file may have."""
        return self.parsed_bytes // COPIES_OF_TEXT


HEADER = Kind("a safetensors header", 96 << 20)
"""One of 45,000 tensors takes about half of that."""

INDEX = Kind("a shard index", 96 << 20)
"""One of 210,000 tensors, as the largest models have, takes nine tenths of that."""

CONFIG = Kind("a config", 24 << 20)
MANIFEST = Kind("a manifest", 24 << 20)


def read_json(file: Path, kind: Kind, *, unique: bool = False) -> Any:
    """What `file` says.

    Args:
        unique: refuse a key that is there twice in one object.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is not JSON, or would take more than `kind` ever does. The message names the file.
    """
    raw = read_regular(file, kind.max_bytes, kind.name)
    try:
        return parse_json(raw, kind, unique=unique)
    except ValueError as error:
        said = None if raw.lstrip()[:1] in (b"{", b"[") else complaint(file, raw[:HEAD_BYTES], "")
        raise CheckpointError(said or f"{file} is not {kind.name}: {error}. Download it again") from None


def parse_json(raw: bytes, kind: Kind, *, unique: bool = False) -> Any:
    """The value of the JSON text `raw`.

    Raises:
        ValueError: it is none, or would take more than `kind` ever does.
    """
    check_json(raw, kind)
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates if unique else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start:,}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None


def check_json(raw: bytes, kind: Kind) -> None:
    """Refuse the JSON text `raw` if parsing it would take more than `kind` ever does. Does not look whether it is JSON.

    Raises:
        ValueError: the message says what is too much.
    """
    if raw.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark, which JSON has none of")
    if (b"\\ud" in raw or b"\\uD" in raw) and _LONE_SURROGATE.search(raw.replace(rb"\\", b"__")):
        raise ValueError("a text in it has half of a surrogate pair")
    text_bytes = len(raw) * (COPIES_OF_TEXT if raw.isascii() else COPIES_OF_WIDE_TEXT)
    depth = values = 0
    tail = b""
    for bare in _outside_strings(raw):
        values += bare.count(b",") + bare.count(b"[") + bare.count(b"{")
        if text_bytes + values * VALUE_BYTES > kind.parsed_bytes:
            raise ValueError(
                f"it has {counted(len(raw), 'byte')} and {counted(values, 'value')} or more, above what {kind.name} has"
            )
        tail = (tail[-MAX_DIGITS:] + bare).translate(_DIGITS_ALIKE)
        if _LONG_NUMBER in tail:
            raise ValueError(f"it has a number of more than {MAX_DIGITS} digits")
        depths = list(accumulate(memoryview(bare.translate(_SIGNS, _NOT_BRACKETS)).cast("b"), initial=depth))
        if max(depths) > MAX_DEPTH:
            raise ValueError(f"lists and objects in it are more than {MAX_DEPTH} deep")
        depth = depths[-1]


_CHUNK_BYTES = 1 << 18
_LONE_SURROGATE = re.compile(
    rb"(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]|\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
)
_LONG_NUMBER = b"0" * (MAX_DIGITS + 1)
_DIGITS_ALIKE = bytes.maketrans(b"123456789", b"0" * 9)
_SIGNS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff")
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
_NOT_BACKSLASH = re.compile(rb"[^\\]")


def _outside_strings(raw: bytes) -> Iterator[bytes]:
    """What is not within quotes, piece by piece."""
    start, inside = 0, False
    while start < len(raw):
        end = start + _CHUNK_BYTES
        whole = _NOT_BACKSLASH.search(raw, end - 1)  # so that no escape is cut in two
        end = whole.end() if whole is not None else len(raw)
        pieces = raw[start:end].replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
        yield b"".join(pieces[inside::2])
        inside ^= len(pieces) % 2 == 0
        start = end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if a key is there twice: readers disagree on which of them counts."""
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return values
