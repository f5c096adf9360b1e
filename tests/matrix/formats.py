"""docs/formats.json, which docs/models.md is made of, from a run of the tests.

    python -m tests.matrix.formats

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
from tests.matrix.page import FORMAT_RESULTS, PAGE, SECTIONS, make_page
from tests.stand_ins.quantized_models import INTEGERS

PACKAGES = ("torch", "transformers", "bitsandbytes", "torchao", "compressed-tensors", "accelerate")
TEST = "test_streamed_is_resident"
TESTED = "tested here: bit-identical"
TESTED_DENSE = "tested here: bit-identical to the dense weights that it stands for"
NEEDS_A_GPU = {"fp8 as it lies (FP8 kernels)": "needs a GPU: its byte plan is tested, its kernels have not been run"}


def run() -> dict[str, Any]:
    """Run the tests. A format whose package is missing is left out; one that fails ends the program."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        pytest = [sys.executable, "-m", "pytest", "-q", "tests/compat/test_quantized.py"]
        subprocess.run([*pytest, "-k", TEST, f"--junitxml={report}"], check=True, stdout=subprocess.DEVNULL)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    passed = [case.get("name", "") for case in cases if case.find("skipped") is None]
    names = [name[len(TEST) + 1 : -1] for name in passed]
    rows = [{"format": name, "verdict": TESTED_DENSE if name in INTEGERS else TESTED} for name in names]
    rows += [{"format": name, "verdict": verdict} for name, verdict in NEEDS_A_GPU.items()]
    refused = {name: reason for name, reason in REFUSED.items() if name != "gguf"}  # which has a page of its own
    rows += [{"format": name, "verdict": f"not supported: {reason}"} for name, reason in refused.items()]
    return {"versions": _versions(), "formats": rows}


def _versions() -> dict[str, str]:
    installed = {str(package.name): str(package.version) for package in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def main() -> None:
    FORMAT_RESULTS.write_text(json.dumps(run(), indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(make_page(SECTIONS), encoding="utf-8")


if __name__ == "__main__":
    main()
