"""Every architecture that transformers has: streamed to the bit like the resident model, one layer in memory at a time.

A fixed fifth runs with the other tests, every case in the same one always; `pytest -m matrix tests/matrix` runs all of
it. `python -m tests.matrix` does too, and writes the results that docs/models.md is made of.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.matrix.cases import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, LISTED, REASONS, Case, matrix
from tests.matrix.examine import UnableError, examine
from tests.matrix.page import PAGE, RESULTS, ROOT, SECTIONS, make_page

PART = 0
"""Of the matrix: the one that always runs."""


def cases() -> list[pytest.param]:
    for case in matrix():
        marks = [pytest.mark.matrix]
        if case.part != PART:
            marks.append(pytest.mark.matrix_rest)
        if case in REASONS:
            marks.append(pytest.mark.skip(reason=REASONS[case]))
        yield pytest.param(case, id=str(case), marks=marks)


@pytest.fixture
def one_thread():
    """Kernels of several threads may sum in another order from one call to the next."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore")  # of models, about themselves
@pytest.mark.parametrize("case", list(cases()))
def test_streamed_as_resident(case: Case, tmp_path: Path, one_thread: None) -> None:
    verdict = examine(case, tmp_path)
    assert verdict.units > 0
    assert verdict.streamed_share > 0


def halves() -> list[pytest.param]:
    """Every case in both half-precision types; a twenty-fifth always runs, and what has a bias at its head."""
    for case in matrix():
        for dtype in (torch.bfloat16, torch.float16):
            name = f"{case}-{str(dtype).removeprefix('torch.')}"
            runs = zlib.crc32(name.encode()) % 25 == PART or case.model_type in BIASED_HEADS
            marks = [pytest.mark.matrix] if runs else [pytest.mark.matrix, pytest.mark.matrix_rest]
            if case in REASONS:
                marks.append(pytest.mark.skip(reason=REASONS[case]))
            yield pytest.param(case, dtype, id=name, marks=marks)


BIASED_HEADS = ("phi", "gptj", "codegen", "ctrl")


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "dtype"), list(halves()))
def test_streamed_as_resident_in_half_precision(
    case: Case, dtype: torch.dtype, tmp_path: Path, one_thread: None
) -> None:
    """Batches too: kernels of half-precision numbers differ by how many sequences there are, and by what is added."""
    try:
        verdict = examine(case, tmp_path, dtype)
    except UnableError as reason:
        pytest.skip(f"transformers itself: {reason}")
    assert verdict.units > 0
    assert verdict.has_batch or case.model_type not in BIASED_HEADS


@pytest.mark.parametrize("auto_class", [CAUSAL_LM, IMAGE_TEXT_TO_TEXT])
def test_every_model_that_writes_or_sees_is_tried_or_has_a_reason(auto_class: str) -> None:
    """Of the types that the installed transformers has."""
    tried = {case.model_type for case in matrix() if case.auto_class == auto_class and case not in REASONS}
    assert len(tried) >= len(LISTED[auto_class]) - 8
    assert all(REASONS.values())


def test_the_parts_are_of_much_the_same_size() -> None:
    sizes = [sum(case.part == part for case in matrix()) for part in range(5)]
    assert max(sizes) < 1.5 * min(sizes)


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(SECTIONS), "run `python -m tests.matrix --page`"


def test_the_readme_counts_as_the_results_do() -> None:
    verdicts = [row["verdict"] for row in json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]]
    said = f"[{verdicts.count('equal')} of {len(verdicts)} types](docs/models.md)"
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_results_are_those_of_a_full_run() -> None:
    """Every case has one, at least of the release that they are of, and none failed."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert {row["verdict"] for row in results["cases"]} <= {"equal", "not tried"}
    equal = Counter(row["auto_class"] for row in results["cases"] if row["verdict"] == "equal")
    assert equal[CAUSAL_LM] >= 181
    assert equal[IMAGE_TEXT_TO_TEXT] >= 94
