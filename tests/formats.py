"""docs/formats.json from a run of the tests, and the table of docs/quantized.md from docs/formats.json.

    python -m tests.formats

Knows which formats the tests write, and what airstream refuses. A format counts as tested only if its test has passed.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from airstream.compat.quantizers import REFUSED

DOCS = Path(__file__).parent.parent / "docs"
START, END = "<!-- formats -->", "<!-- end of formats -->"
PACKAGES = ("torch", "transformers", "bitsandbytes", "torchao", "compressed-tensors", "accelerate")
TEST = "test_streamed_is_resident"
TESTED = "tested here: bit-identical"
NEEDS_A_GPU = {"fp8 as it lies (FP8 kernels)": "needs a GPU: its byte plan is tested, its kernels have not been run"}


def table(results: dict[str, Any]) -> str:
    """The table of the page."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rows = [f"| {row['format']} | {row['verdict']} |" for row in results["formats"]]
    return "\n".join([START, "| format | verdict |", "|---|---|", *rows, "", f"With {versions}, on a CPU.", END])


def run() -> dict[str, Any]:
    """Run the tests. A format whose package is missing is left out; one that fails ends the program."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_quantized.py", "-k", TEST, f"--junitxml={report}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    passed = [case.get("name", "") for case in cases if case.find("skipped") is None]
    rows = [{"format": name[len(TEST) + 1 : -1], "verdict": TESTED} for name in passed]
    rows += [{"format": name, "verdict": verdict} for name, verdict in NEEDS_A_GPU.items()]
    refused = {name: reason for name, reason in REFUSED.items() if name != "gguf"}  # which has a page of its own
    rows += [{"format": name, "verdict": f"not supported: {reason}"} for name, reason in refused.items()]
    return {"versions": _versions(), "formats": rows}


def _versions() -> dict[str, str]:
    installed = {str(package.name): str(package.version) for package in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def main() -> None:
    results = run()
    (DOCS / "formats.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page = DOCS / "quantized.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(before + table(results) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
