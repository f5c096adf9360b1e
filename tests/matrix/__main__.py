"""The full matrix: `python -m tests.matrix [TYPE...]`. Of single types, the results there are get new rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

from tests.matrix.cases import REASONS, Case, matrix
from tests.matrix.examine import UnableError, examine
from tests.matrix.page import PAGE, RESULTS, SECTIONS, make_page

DTYPES = ("float32", "bfloat16", "float16")

SECONDS = 60
"""One case may take."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types to try (default: all)")
    parser.add_argument("--page", action="store_true", help="make docs/models.md of the results there are, no more")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights; only float32 is written down")
    arguments = parser.parse_args()
    if not arguments.page:
        dtype = getattr(torch, arguments.dtype)
        rows = [run(case, dtype) for case in matrix() if not arguments.types or case.model_type in arguments.types]
        bad = [row for row in rows if row["verdict"] == "fails"]
        print(f"{len(rows)} cases, {sum(row['verdict'] == 'equal' for row in rows)} equal, {len(bad)} fail")
        if arguments.dry or arguments.dtype != "float32":
            return bool(bad)
        versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
        if bad:
            print("nothing is written: what fails has to be mended, or be given its reason in tests/matrix/cases.py")
            return 1
        if arguments.types:
            rows = merged(json.loads(RESULTS.read_text(encoding="utf-8")), versions, rows)
        RESULTS.write_text(json.dumps(versions | {"cases": rows}, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(make_page(SECTIONS), encoding="utf-8")
    return 0


def run(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """What came out for `case`, as a row of the results."""
    row = {"auto_class": case.auto_class, "model_type": case.model_type}
    if case in REASONS:
        return row | {"verdict": "not tried", "reason": REASONS[case]}
    started = time.monotonic()
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            row |= {"verdict": "equal", **dataclasses.asdict(examine(case, Path(folder), dtype))}
    except UnableError as error:
        row |= {"verdict": "not tried", "reason": str(error)}
    except Exception as error:  # the others are to be tried all the same
        row |= {"verdict": "fails", "reason": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.alarm(0)
    print(f"{case}: {row['verdict']} {row.get('reason', '')} ({time.monotonic() - started:.1f} s)", flush=True)
    return row


def merged(results: dict[str, Any], versions: dict[str, str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `results`, and in place of some of them, or besides, `rows`; in the order of the matrix."""
    if {name: results[name] for name in versions} != versions:
        raise SystemExit(f"the results there are of other versions than {versions}: run all of the matrix")
    by_case = {Case(row["auto_class"], row["model_type"]): row for row in (*results["cases"], *rows)}
    return [by_case[case] for case in matrix() if case in by_case]


def _too_slow(*_: object) -> NoReturn:
    raise TimeoutError(f"took more than {SECONDS} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, _too_slow)
    sys.exit(main())
