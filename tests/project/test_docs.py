"""What the documents say works: every Python example, every command line, the notebook, the links."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from airstream.cli import main
from airstream.cli.parser import build_parser
from airstream.loading import options as config
from airstream.loading.arguments import HARMLESS, HONOURED, REFUSED
from tests.conftest import WriteTiny

ROOT = Path(__file__).resolve().parents[2]
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
def folder(tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An instruct model to stand in for the user's; torch's accelerator may be the simulated one by now: not theirs."""
    monkeypatch.setattr(config, "default_device", lambda: torch.device("cpu"))
    copy = Path(shutil.copytree(tiny("llama", torch.bfloat16), tmp_path / "tiny"))
    (copy / "chat_template.jinja").write_text("{% for turn in messages %}w5 {{ turn['content'] }} w6 {% endfor %}w7")
    return copy


@pytest.mark.parametrize("code", fenced("python"))
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_python_examples_run(
    code: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, object] = {}
    if "peft" in code:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)  # for what they write
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "cache"))
    exec(compile(code.replace(PLACEHOLDER, str(folder)), "example", "exec"), names)
    if hasattr(names.get("model"), "close"):
        names["model"].close()
    assert capsys.readouterr().out or "print" not in code


VERDICTS = {"honoured": set(HONOURED), "changes nothing": set(HARMLESS), "refused": set(REFUSED)}


def rows_of_migrating() -> list[pytest.param]:
    text = (ROOT / "docs" / "migrating.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \| (.*) \|$", text, re.MULTILINE)
    return [pytest.param(*row, id=row[0]) for row in rows]


@pytest.mark.parametrize(("argument", "verdict", "how"), rows_of_migrating())
def test_what_migrating_says_of_an_argument_is_what_happens(argument: str, verdict: str, how: str) -> None:
    assert argument in VERDICTS[verdict]
    if how.startswith("as `"):
        assert HONOURED[argument][0] == how.split("`")[1]


def test_migrating_has_the_arguments_that_people_come_with() -> None:
    assert len(rows_of_migrating()) >= 25


def commands() -> list[pytest.param]:
    """Every `airstream ...` line of the documents."""
    lines = (line for block in fenced("sh") for line in block.values[0].splitlines())
    return [pytest.param(shlex.split(line), id=line) for line in lines if line.startswith("airstream ")]


@pytest.mark.parametrize("words", commands())
def test_commands_are_understood(words: list[str]) -> None:
    assert callable(build_parser("0.1.0").parse_args(words[1:]).run)


PROGRAMS = sorted({name for document in DOCUMENTS for name in re.findall(r"python -m\s([\w.]+)", document.read_text())})


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_documents_name_are_there(name: str) -> None:
    found = importlib.util.find_spec(name)
    assert found, f"python -m {name}"
    assert not found.submodule_search_locations or importlib.util.find_spec(f"{name}.__main__"), "a folder does not run"


PATH = re.compile(r"(?<![\w/.(\[-])(?:airstream|benchmarks|docs|notebooks|tests|\.ci)/[\w/.-]*")
"""From the root of the project; in a link it is the link that counts."""

PATHS = [
    pytest.param(path, id=f"{document.name}-{path}")
    for document in DOCUMENTS
    for path in sorted({path.rstrip(".") for path in PATH.findall(document.read_text())})
]


@pytest.mark.parametrize("path", PATHS)
def test_files_and_folders_that_documents_name_are_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_scan_sees_paths() -> None:
    """Else the test above would pass for the wrong reason."""
    found = {param.values[0] for param in PATHS}
    assert {"tests/project/test_architecture.py", "airstream/plan/", "benchmarks/README.md", ".ci/run"} <= found


def test_the_readme_shows_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    chained = [line for line in readme.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert [line.split()[-2:] for line in chained] == [[".venv/bin/airstream", "demo"], ["-n", "auto"]]


def test_ci_runs_the_command_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines[lines.index("<!-- tests -->") + 2].endswith(".venv/bin/python -m pytest -q -n auto")


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


def test_notebooks_install_from_where_the_project_is() -> None:
    """One placeholder, in setup.py: whoever changes it is told what else names it."""
    (url,) = re.findall(r'^PROJECT_URL = "(.+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(notebook, as_version=4).cells
        assert any(f'else "git+{url}"' in cell.source and "airstream[" in cell.source for cell in cells), notebook.name


INSTALLED_FROM = [
    *DOCUMENTS,
    *sorted(path for part in ("airstream", "benchmarks") for path in (ROOT / part).rglob("*.py")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]


@pytest.mark.parametrize("file", INSTALLED_FROM, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_tells_pip_to_look_for_airstream_in_an_index(file: Path) -> None:
    """It is in none: a checkout (`.[demo]`), a URL (`airstream[demo] @ ...`), or the package that is needed."""
    for line in file.read_text(encoding="utf-8").splitlines():
        assert not re.search(r"\bairstream\[[a-z,]+\](?! @ )", line), line
        assert not re.search(r"pip install (-\S+ )*[\"']?airstream\b(?!\[)", line), line


@pytest.fixture(scope="module")
def packaging() -> dict[str, Any]:
    """What setup.py says of the package; it is not built."""
    said = dict[str, Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **arguments: said.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return said


def test_the_readme_leads_somewhere_from_an_index_of_packages(packaging: dict[str, Any]) -> None:
    shown = packaging["long_description"]
    assert len(re.findall(r"\]\(", shown)) > 20
    targets = re.findall(r"\]\(([^)]+)\)", shown)
    assert all(re.match(r"https://[^)]+$", target) for target in targets), targets
    inside = [target.removeprefix(packaging["url"] + "/blob/main/") for target in targets]
    assert all((ROOT / path.partition("#")[0]).exists() for path in inside if not path.startswith("https:"))


def test_the_extra_all_has_all_that_users_need(packaging: dict[str, Any]) -> None:
    extras = packaging["extras_require"]
    assert set(extras["all"]) == {need for name, needs in extras.items() if name != "test" for need in needs}


def test_a_source_distribution_has_what_its_tests_read() -> None:
    grafted = (ROOT / "MANIFEST.in").read_text()
    for needed in ("benchmarks", "docs", "notebooks", "tests", "README.md", "CHANGELOG.md", "LICENSE"):
        assert (ROOT / needed).exists()
        assert re.search(rf"^(graft|include) .*\b{re.escape(needed)}\b", grafted, re.MULTILINE), needed


def outputs_of(notebook: str) -> list[dict]:
    """Run a notebook; give what its cells have shown."""
    book = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    NotebookClient(book, timeout=240).execute()
    return [output for cell in book.cells for output in cell.get("outputs", ())]


@pytest.mark.realmodel
@pytest.mark.timeout(600)
def test_the_quickstart_notebook_runs(smollm2_folder: Path) -> None:
    printed = "".join(output.get("text", "") for output in outputs_of("quickstart.ipynb"))
    assert "The capital of France is Paris." in printed
    assert "GB streamed" in printed
    assert re.search(r"\d+ tokens, .*/token, .* from (disk|page cache)", printed), "the live line"


@pytest.mark.realmodel
@pytest.mark.timeout(600)
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
