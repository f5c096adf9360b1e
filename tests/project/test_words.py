"""What is printed reads as English does: one file, two files, never "1 files" or "file(s)"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import airstream
from airstream.reporting.units import counted

ROOT = Path(airstream.__file__).parent

NOUNS = (
    "batches|bytes|cards|cores|characters|checksums|dimensions|elements|entries|experts|faults|files|layers|lines|"
    "messages|models|parts|passes|positions|rows|sequences|shards|stacks|tensors|threads|times|tokens|values"
)
COUNTED = re.compile(rf" (?:new |more |other |of the )?(?:{NOUNS})\b")
"""What follows a number that may be one. Of what an upper-case constant says there are more."""

NEVER_ONE = {
    ("airstream/codecs/decode.py", "raw.numel()"),  # below the floor of `counted`, of a block
    ("airstream/rates/measure.py", "other_cores"),  # 1.0 cores
    ("airstream/profiling/plot.py", "len(passes)"),
    ("airstream/repacking/files.py", "len(stacks)"),
}
"""Numbers of which one has been ruled out where they are printed."""


def texts() -> Iterator[tuple[str, ast.AST]]:
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            yield file.relative_to(ROOT.parent).as_posix(), node


def uncounted(node: ast.AST) -> Iterator[str]:
    """The numbers in an f-string that nouns in the plural follow."""
    if not isinstance(node, ast.JoinedStr):
        return
    for value, after in zip(node.values, node.values[1:], strict=False):
        if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant):
            number = ast.unparse(value.value)
            if COUNTED.match(str(after.value)) and not number.isupper() and not number.startswith("counted("):
                yield number


def test_numbers_and_nouns_agree() -> None:
    found = {(file, number) for file, node in texts() for number in uncounted(node)}
    assert found == NEVER_ONE, "units.counted makes one of two"


def test_no_noun_leaves_open_how_many_there_are() -> None:
    strings = [(file, node.value) for file, node in texts() if isinstance(node, ast.Constant)]
    assert len(strings) > 1000
    assert not [text for text in strings if isinstance(text[1], str) and re.search(r"[a-z]\(s\)", text[1])]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('f"{count} files"', ["count"]),
        ('f"{len(ids):,} new tokens"', ["len(ids)"]),
        ('f"{MAX_FILES} files"', []),
        ("f\"{counted(count, 'file')} in {n} files\"", ["n"]),
        ('f"{name} files are missing"', ["name"]),
        ('f"{name} is there"', []),
    ],
)
def test_the_scan_sees_numbers(code: str, found: list[str]) -> None:
    """Else it would pass for the wrong reason."""
    assert list(uncounted(ast.parse(code, mode="eval").body)) == found


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "file", "0 files"), (1, "file", "1 file"), (2, "batch", "2 batches"), (1, "pass", "1 pass"),
     (3, "pass", "3 passes"), (1024, "new token", "1,024 new tokens")],
)  # fmt: skip
def test_counted(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text
