"""Every tensor that is made says its dtype and device: torch's defaults belong to the process, and others change them.

transformers does, for a moment, whenever it builds a model, in whatever thread.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import airstream

FILES = sorted(Path(airstream.__file__).parent.rglob("*.py"))
MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"}


def unsaid(tree: ast.AST) -> list[str]:
    """The calls that leave something to a default."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    made = [call for call in calls if ast.unparse(call.func) in {f"torch.{name}" for name in MAKERS}]
    return [ast.unparse(call) for call in made if not {"dtype", "device"} <= {given.arg for given in call.keywords}]


def test_an_unsaid_device_is_seen() -> None:
    assert unsaid(ast.parse("x = torch.empty(3, dtype=torch.uint8)")) == ["torch.empty(3, dtype=torch.uint8)"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(file.parts[-2:]))
def test_made_tensors_say_dtype_and_device(file: Path) -> None:
    assert unsaid(ast.parse(file.read_text(encoding="utf-8"))) == []
