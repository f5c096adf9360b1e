"""The suite of comparisons, their charts, and the README's table, without measuring anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.limited import LimitError
from benchmarks.peers.measure import Request, generate_with_transformers
from benchmarks.report import Reference, Run
from benchmarks.settings import known_names
from benchmarks.suite import __main__ as suite
from benchmarks.suite import compare, plot, readme
from tests.benchmarks.test_benchmarks import record

ROOT = Path(__file__).resolve().parents[2]


def results(size: float = 6e9, systems: tuple[str, ...] = ("airstream", "airllm", "llamacpp")) -> dict[str, Any]:
    """What a comparison gives, one system having failed."""
    runs = [
        Run(name, turn, record(system=name, version="airllm 4.0.0, torch 2", decode_seconds_per_token=turn + place))
        for turn in (1, 2, 3)
        for place, name in enumerate(systems[:-1] or systems)
    ]
    runs += [Run(systems[-1], 1, error="exit status 1: no")] if len(systems) > 1 else []
    context = {
        "title": "a model in 3,000 MiB",
        "machine": {"cpu": "some CPU", "cores": 2, "memory_bytes": 24e9, "kernel": "6.1"},
        "disk": {"bytes_per_second_before_and_after_turns": [1e9, 2e9]},
        "model": {"weight_bytes": size, "dtype": "bfloat16"},
        "prompt": [1, 2],
        "num_tokens": 3,
        "decoding": "greedy",
        "cache_state": "cold",
        "limit_mib": 3000,
        "turns": 3,
    }
    return json.loads(json.dumps(report.as_json(context, runs, Reference("transformers", [1, 2, 3]))))


def test_every_case_makes_sense(tmp_path: Path) -> None:
    for name, case in suite.CASES.items():
        settings = case.settings(tmp_path, turns=5, timeout_seconds=60)
        assert settings.turns == 5
        assert len(settings.prompt) == case.prompt_tokens
        settings.checkpoint.mkdir(parents=True, exist_ok=True)
        assert settings.request(settings.systems[0]).batch_size == case.batch_size
        assert name == name.lower()
    folders = {case.model: case.settings(tmp_path, 1, 1).checkpoint for case in suite.CASES.values()}
    assert len(set(folders.values())) == len(folders), "two models in one folder"


def test_cases_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert known_names("w6-3000mib,w6-3000mib", suite.CASES) == ["w6-3000mib"]
    with pytest.raises(SystemExit):
        suite.main(["--cases", "nonsense"])
    assert "known: w6-3000mib" in capsys.readouterr().err
    assert suite.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(suite.CASES)


def test_a_case_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compare, "compare", lambda settings: (results(), "a table\n"))
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path), "--cases", "w6-3000mib,scale-1gb,scale-3gb"]
    assert suite.main(words) == 0
    assert json.loads((tmp_path / "w6-3000mib.json").read_text())["case"] == "w6-3000mib"
    assert (tmp_path / "w6-3000mib.md").read_text() == "# 6 GB model in 3,000 MiB\n\na table\n"
    for picture in ("w6-3000mib.png", "scale.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_suite_that_cannot_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(settings: Any) -> Any:
        raise LimitError("needs root")

    monkeypatch.setattr(compare, "compare", refuse)
    assert suite.main(["--out", str(tmp_path), "--cases", "w6-3000mib"]) == 1
    assert "needs root" in capsys.readouterr().err
    assert suite.main(["--data", str(tmp_path), "--out", str(tmp_path), "--cases", "smollm2-400mib"]) == 1
    assert "airstream demo" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_pictures_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = []
    for number, size in enumerate((1e9, 3e9, 13e9)):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(results(size, systems=("airstream",))))
    plot.main([*map(str, files), "--out", str(tmp_path / "scale.png")])
    files[0].write_text(json.dumps(results()))
    plot.main([str(files[0]), "--out", str(tmp_path / "case.png")])
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("scale.png", "case.png"))


# ------------------------------------------------------------------------------------------------------- the README


def test_the_readme_shows_what_was_measured() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.MARKED.search(text), "the table has lost its marks"
    assert readme.updated(text) == text, "run `python -m benchmarks.suite.readme`"


def test_a_difference_is_found_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "case.json").write_text(json.dumps(results()))
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- speeds: case -->\nold\n<!-- end of speeds -->\nafter\n")
    monkeypatch.setattr(readme, "README", file)
    monkeypatch.setattr(readme, "updated", lambda text, made=readme.updated: made(text, tmp_path))
    assert readme.main(["--check"]) == 1
    assert "python -m benchmarks.suite.readme" in capsys.readouterr().err
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    lines = file.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[4].startswith("| **airstream** | **2.00** |")
    assert lines[5].startswith("| AirLLM 4.0.0 | 3.00 |")
    assert lines[6] == "| llama.cpp (llama-cpp-python ?), mmap | failed | | | | |"
    assert lines[-1] == "after"


def test_several_comparisons_are_one_table() -> None:
    first, second = results(), results()
    second["runs"][-1]["error"] = "killed: it needs more memory than the limit"
    lines = readme.overview([first, second]).splitlines()
    assert lines[0].startswith("| | **airstream** | AirLLM |")
    assert lines[2].split(" | ")[1:5] == ["**1.00**", "**1.00**", "", "failed"]
    assert lines[3].split(" | ")[4] == "out of memory"
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    second["machine"]["cpu"] = "another"
    with pytest.raises(ValueError, match="different machines"):
        readme.overview([first, second])


# ---------------------------------------------------------------------------------------------------------- batches


def test_sequences_of_a_batch_have_prompts_of_their_own(tmp_path: Path) -> None:
    request = Request(tmp_path, tmp_path, [10, 11], num_tokens=2, budget_bytes=None, batch_size=3)
    assert request.prompts == [[10, 11], [11, 12], [12, 13]]
    assert "--batch=3" in request.arguments()


def test_a_batch_gives_the_tokens_of_all_sequences(tiny: Any) -> None:
    import torch

    from benchmarks.peers.measure import TokenClock
    from tests.conftest import stream

    folder = tiny("llama", torch.bfloat16)
    request = Request(folder, folder, [10, 11, 12], num_tokens=4, budget_bytes=None, batch_size=2)
    clock = TokenClock()
    with stream(folder) as model:
        tokens = generate_with_transformers(model, request, clock)
        alone = generate_with_transformers(model, Request(folder, folder, [11, 12, 13], 4, None), TokenClock())
    assert len(tokens) == 8
    assert tokens[4:] == alone
    assert len(clock.seconds) == 4
