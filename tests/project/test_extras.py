"""What is said of an optional package that is missing: an extra that setup.py has, and that brings the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALL = re.compile(r"install\('([\w-]+)', '([\w-]+)'\)|install\(\"([\w-]+)\", \"([\w-]+)\"\)")


def named() -> list[tuple[str, str, str]]:
    """(module, package, extra) wherever the package tells what to install."""
    found = []
    for file in sorted((ROOT / "airstream").rglob("*.py")):
        for match in CALL.finditer(file.read_text(encoding="utf-8")):
            package, extra = (group for group in match.groups() if group)
            found.append((file.relative_to(ROOT).as_posix(), package, extra))
    return found


def extras() -> dict[str, list[str]]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
    )
    return ast.literal_eval(next(values))


@pytest.mark.parametrize(("module", "package", "extra"), named())
def test_the_extra_that_a_message_names_brings_the_package(module: str, package: str, extra: str) -> None:
    assert any(re.match(rf"{package}\b", requirement) for requirement in extras()[extra])


def test_every_message_goes_through_one_function() -> None:
    """Else the next one names no extra."""
    assert {package for _, package, _ in named()} == {
        "bitsandbytes",
        "compressed-tensors",
        "gguf",
        "matplotlib",
        "peft",
        "torchao",
    }
    allowed = {"airstream/reporting/extras.py", "airstream/profiling/profile.py", "airstream/compat/quantizers.py"}
    by_hand = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "airstream").rglob("*.py")
        if "pip install" in file.read_text(encoding="utf-8")
    }
    assert by_hand <= allowed, "pandas has no extra, and which package a quantised checkpoint needs is in its config"
