"""What the documents say works: every Python example, every command line, the notebook, the links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from airstream import config
from airstream.cli import main
from airstream.cli.parser import build_parser
from tests.conftest import WriteTiny

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
PLACEHOLDER = "some/model-or-folder"


def fenced(language: str) -> list[pytest.param]:
    """Every block of `language` in the documents."""
    return [
        pytest.param(block, id=f"{document.name}-{number}")
        for document in DOCUMENTS
        for number, block in enumerate(re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL))
    ]


@pytest.fixture
def folder(tiny: WriteTiny, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint to stand in for the user's; torch's accelerator may be the simulated one by now: not for users."""
    monkeypatch.setattr(config, "default_device", lambda: torch.device("cpu"))
    return tiny("llama", torch.bfloat16)


@pytest.mark.parametrize("code", fenced("python"))
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_python_examples_run(
    code: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, object] = {}
    if "peft" in code:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)  # for what they write
    exec(compile(code.replace(PLACEHOLDER, str(folder)), "example", "exec"), names)
    if hasattr(names.get("model"), "close"):
        names["model"].close()
    assert capsys.readouterr().out or "print" not in code


def commands() -> list[pytest.param]:
    """Every `airstream ...` line of the documents."""
    lines = (line for block in fenced("sh") for line in block.values[0].splitlines())
    return [pytest.param(shlex.split(line), id=line) for line in lines if line.startswith("airstream ")]


@pytest.mark.parametrize("words", commands())
def test_commands_are_understood(words: list[str]) -> None:
    assert callable(build_parser().parse_args(words[1:]).run)


def test_the_readme_shows_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    chained = [line for line in readme.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert [line.split()[-2:] for line in chained] == [[".venv/bin/airstream", "demo"], ["pytest", "-q"]]


def test_ci_runs_the_command_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines[lines.index("<!-- tests -->") + 2].endswith(".venv/bin/python -m pytest -q")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_stored_without_output(notebook: Path) -> None:
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def outputs_of(notebook: str) -> list[dict]:
    """Run a notebook; give what its cells have shown."""
    book = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    NotebookClient(book, timeout=240).execute()
    return [output for cell in book.cells for output in cell.get("outputs", ())]


@pytest.mark.realmodel
def test_the_quickstart_notebook_runs(smollm2_folder: Path) -> None:
    printed = "".join(output.get("text", "") for output in outputs_of("quickstart.ipynb"))
    assert "The capital of France is Paris." in printed
    assert "GB streamed" in printed
    assert re.search(r"\d+ tokens, .*/token, .* from (disk|page cache)", printed), "the live line"


@pytest.mark.realmodel
def test_the_profiling_notebook_runs(smollm2_folder: Path) -> None:
    outputs = outputs_of("profiling.ipynb")
    printed = "".join(output.get("text", "") for output in outputs)
    waits = dict(re.findall(r"^(.+?)  .*of which +([0-9.]+) ms waiting", printed, re.MULTILINE))
    assert float(waits["no reading ahead"]) > float(waits["enough memory"])
    assert float(waits["enough memory"]) < 1
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "generate", "chat", "plan"))
