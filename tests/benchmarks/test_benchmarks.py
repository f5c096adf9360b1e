"""The parts of `benchmarks` that measure nothing: order, arithmetic, parsing, and what becomes of a failing peer."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import charts, conditions, disk, launch, limited, memory, report, startup, systems
from benchmarks.checkpoints import Shape, shard_names, write_checkpoint
from benchmarks.launch import ROOT, execute
from benchmarks.law import __main__ as law
from benchmarks.law import child as law_child
from benchmarks.law import plot as plot_law
from benchmarks.law import report as law_report
from benchmarks.law.report import Budget, Cliff, LawRun, Measured
from benchmarks.peers import airstream_runner, measure
from benchmarks.peers.measure import Record, Request, Runner, TokenClock
from benchmarks.report import Reference, Run, Spread
from benchmarks.settings import checkpoint_key, parse_mib, parse_settings
from benchmarks.stream import __main__ as stream
from benchmarks.suite import compare
from tests.conftest import smallest_budget

TINY = Shape(hidden=16, intermediate=32, layers=2, vocab=300, heads=4, kv_heads=2)
REQUIRED = ["--checkpoint=model", "--limit-mib=3000", "--venvs=venvs", "--work=work"]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts through /proc and pidfd")


def record(**fields: Any) -> Record:
    """A record with every field filled."""
    plain: dict[str, Any] = {
        "system": "fake",
        "version": "fake 1.0",
        "tokens": [1, 2, 3],
        "load_seconds": 0.5,
        "ttft_seconds": 2.0,
        "seconds_per_token": 1.0,
        "decode_seconds_per_token": 0.75,
        "peak_rss_bytes": 2_000_000_000,
        "read_bytes": 3_000_000_000,
    }
    return Record(**plain | fields)


def runs_of(system: str, *seconds: float, **fields: Any) -> list[Run]:
    return [
        Run(system, turn, record(system=system, seconds_per_token=value, **fields))
        for turn, value in enumerate(seconds, start=1)
    ]


# --- order and arithmetic


def test_schedule_alternates_and_shifts_the_first():
    assert report.schedule(["a", "b", "c"], 2) == [(1, "a"), (1, "b"), (1, "c"), (2, "b"), (2, "c"), (2, "a")]


def test_schedule_of_nothing_is_empty():
    assert report.schedule([], 3) == []


def test_spread_is_median_and_extremes():
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(median=3.0, min=1.0, max=10.0)
    assert str(Spread.of([3.0, 1.0, 10.0])) == "3.00 (1.00-10.00)"
    assert str(Spread.of([2.5])) == "2.50"


def test_summarise_skips_failures_and_what_was_not_counted():
    runs = [*runs_of("a", 1.0, 3.0, read_bytes=None), Run("a", 3, error="boom"), Run("b", 1, error="boom")]
    summaries = report.summarise(runs)
    assert list(summaries) == ["a"]
    assert summaries["a"]["seconds_per_token"] == Spread(2.0, 1.0, 3.0)
    assert "read_gb" not in summaries["a"]


@pytest.mark.parametrize(
    ("tokens", "cell"), [([1, 2, 3], "yes"), ([1, 9, 3], "no (first 1 of 3)"), ([9, 2, 3], "no (first 0 of 3)")]
)
def test_tokens_are_compared_up_to_the_first_difference(tokens, cell):
    runs = [*runs_of("a", 1.0), *runs_of("a", 1.0, tokens=tokens)]
    assert report.describe_tokens("a", runs, Reference("transformers", [1, 2, 3])) == cell


def test_fallback_reference_is_airstream():
    assert report.fallback_reference([*runs_of("b", 1.0), *runs_of("airstream", 1.0)]) == Reference(
        "airstream", [1, 2, 3]
    )
    assert report.fallback_reference([Run("airstream", 1, error="boom")]) is None


# --- what people and programs read


def test_table_has_a_row_for_every_system_and_every_failure_in_full():
    runs = [*runs_of("a", 1.0, 3.0), Run("b", 1, error="exit status 1: Traceback\nValueError: no"), *runs_of("b", 4.0)]
    runs += [Run("c", 0, error="no environment")]
    lines = report.markdown_table(runs, Reference("transformers", [1, 2, 3])).splitlines()
    assert lines[0] == (
        "| system | s/token | decode s/token | TTFT s | peak RSS GB | disk read GB | own copy GB | its making s "
        "| tokens equal to transformers's |"
    )
    assert lines[2] == "| a | 2.00 (1.00-3.00) | 0.75 | 2.00 | 2.00 | 3.00 | 0.00 | 0.00 | yes |"
    assert lines[3] == "| b | 4.00 | 0.75 | 2.00 | 2.00 | 3.00 | 0.00 | 0.00 | yes |"
    assert lines[4] == "| c | failed | - | - | - | - | - | - | - |"
    assert lines[6:] == ["* b, turn 1: exit status 1: Traceback / ValueError: no", "* c, turn 0: no environment"]


def test_table_without_reference_or_failures():
    table = report.markdown_table(runs_of("a", 1.0), None)
    assert table.splitlines()[-1].endswith("| - |")


def test_json_survives_a_round_trip():
    runs = [*runs_of("a", 1.0, 3.0), Run("b", 1, error="boom", outcome=limited.Outcome(1, 0.1, 0, None))]
    results = report.as_json({"limit_mib": 3000}, runs, Reference("transformers", [1, 2, 3]))
    assert json.loads(json.dumps(results)) == results
    assert results["limit_mib"] == 3000
    assert results["medians"]["a"]["seconds_per_token"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert results["tokens_equal"] == {"a": "yes", "b": "-"}
    assert [run["error"] for run in results["runs"]] == [None, None, "boom"]


def test_progress_line_tells_result_and_failure():
    outcome = limited.Outcome(0, 12.3, 0, None)
    good = Run("a", 2, record(), outcome=outcome)
    assert report.progress_line(3, 8, good) == "[3/8] turn 2 a: 1.00 s/token, TTFT 2.0 s [12 s]"
    assert report.progress_line(4, 8, Run("b", 2, error="x\ny")) == "[4/8] turn 2 b: FAILED, x / y"


def test_record_is_the_last_line():
    assert report.parse_record(f"chatter {{}}\n{json.dumps(asdict(record()))}\n\n") == record()


@pytest.mark.parametrize("stdout", ["", "chatter", "[1, 2]", '{"system": "fake"}', '{"system": "fake", "surprise": 1}'])
def test_other_last_lines_are_refused(stdout):
    with pytest.raises(ValueError, match="not a record"):
        report.parse_record(stdout)


# --- what becomes of a peer


@pytest.fixture
def judged(tmp_path) -> Callable[..., Run]:
    """Run a program as a peer's runner would be run, without a limit, and judge it."""

    def run_and_judge(program: str, timeout_seconds: float = 30.0) -> Run:
        script = tmp_path / "peer.py"
        script.write_text(program)
        return report.judge("fake", 1, *execute([sys.executable, str(script)], timeout_seconds))

    return run_and_judge


@needs_linux
def test_a_peer_that_works(judged):
    run = judged(f"print('chatter')\nprint({json.dumps(asdict(record()))!r})")
    assert (run.record, run.error) == (record(), None)
    assert run.outcome.max_rss_bytes > 1_000_000


@needs_linux
def test_a_peer_that_crashes_leaves_its_last_words(judged):
    run = judged("print('{}')\nraise RuntimeError('out of luck')")
    assert run.record is None
    assert run.error.startswith("exit status 1: ")
    assert run.error.endswith("RuntimeError: out of luck")


@needs_linux
def test_a_peer_that_prints_garbage(judged):
    assert "not a record" in judged("print('tokens: 1 2 3')").error


@needs_linux
def test_a_peer_that_is_killed(judged):
    assert judged("import os\nos.kill(os.getpid(), 9)").error == "ended by signal 9"


@needs_linux
def test_a_peer_that_hangs_is_ended_with_its_children(judged, tmp_path):
    child = tmp_path / "child"
    program = (
        "import pathlib, subprocess, time\n"
        f"pathlib.Path({str(child)!r}).write_text(str(subprocess.Popen(['sleep', '60']).pid))\n"
        "time.sleep(60)"
    )
    run = judged(program, timeout_seconds=1.0)
    assert run.error.startswith("timed out after 1 s")
    assert _ends_soon(int(child.read_text()))


def _ends_soon(pid: int) -> bool:
    """Whether a process that has been killed is gone within seconds: on a busy machine it takes its time to die."""
    for _ in range(100):
        if not _is_running(pid):
            return True
        time.sleep(0.1)
    return False


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # a killed orphan may wait for its reaper


@needs_linux
def test_a_comparison_that_is_told_to_end_leaves_no_peer_behind(tmp_path):
    peer = tmp_path / "peer.pid"
    program = (
        "import sys\nfrom benchmarks import limited\nlimited.end_when_asked()\n"
        f"limited.run(['sh', '-c', 'echo $$ > {peer}; sleep 60'])"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as process:
        deadline = time.monotonic() + 30
        while not (peer.exists() and peer.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == 143
    assert _ends_soon(int(peer.read_text()))


def test_out_of_memory_is_said_in_words():
    outcome = limited.Outcome(-9, 3.0, 0, None, is_out_of_memory=True)
    assert report.judge("fake", 1, outcome, "", "last words").error == (
        "killed: it needs more memory than the limit: last words"
    )


# --- limits and the disk


@needs_linux
def test_a_limit_without_root_is_a_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(limited.LimitError, match="needs root"):
        limited.check_limit()
    assert limited.main(["100", "true"]) == limited.NO_LIMIT_STATUS
    assert "needs root" in capsys.readouterr().err


def test_a_limit_without_linux_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(limited.LimitError, match="Linux"):
        limited.check_limit()


@needs_linux
def test_a_cold_cache_without_root_is_a_clear_error(monkeypatch):
    def refuse() -> None:
        raise PermissionError("not root")

    monkeypatch.setattr(limited, "drop_page_cache", refuse)
    with pytest.raises(limited.LimitError, match=r"needs Linux and root.*not root"):
        limited.check_cold()
    assert compare.main([*REQUIRED, "--limit-mib=none"]) == 1


@needs_linux
def test_disk_rate_of_files(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 100_001)  # not a multiple of a block
    assert disk.read_rate([file, file]) > 0


@needs_linux
def test_disk_rate_of_nothing_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="nothing to read"):
        disk.read_rate([tmp_path / "empty"])


# --- the command line, the systems, the conditions


def test_settings_defaults():
    settings = parse_settings(None, REQUIRED)
    assert [system.name for system in settings.systems] == ["airstream", "airllm", "accelerate", "llamacpp"]
    assert settings.prompt == list(range(10, 42))
    assert settings.budget_mib == 2500
    assert settings.checkpoint.is_absolute()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--systems=airllm,vllm", "unknown: vllm; known: airstream"),
        ("--budget-mib=4000", "not within the limit"),
        ("--limit-mib=much", "neither a whole number of MiB nor none or auto"),
    ],
)
def test_settings_that_make_no_sense_are_refused(extra, message, capsys):
    with pytest.raises(SystemExit):
        parse_settings(None, [*REQUIRED, extra])
    assert message in capsys.readouterr().err


def test_no_limit_and_a_budget_left_to_the_system():
    assert [parse_mib(text) for text in ("3000", "0", "none", "auto")] == [3000, None, None, None]
    unlimited = parse_settings(None, [*REQUIRED, "--limit-mib=none"])
    assert (unlimited.limit_mib, unlimited.budget_bytes) == (None, None)
    assert parse_settings(None, [*REQUIRED, "--limit-mib=0", "--budget-mib=9000"]).budget_mib == 9000
    automatic = parse_settings(None, [*REQUIRED, "--budget-mib=auto"])
    assert (automatic.limit_mib, automatic.budget_bytes) == (3000, None)


def test_every_system_has_its_runner_and_exact_pins():
    for name, system in systems.SYSTEMS.items():
        assert system.name == name
        assert (ROOT / system.runner.replace(".", "/")).with_suffix(".py").is_file()
        assert all(requirement.count("==") == 1 for requirement in system.requirements)
        assert bool(system.requirements) == (system.venv is not None)


def test_command_of_a_system(tmp_path):
    command = systems.SYSTEMS["airllm"].command(tmp_path, "run", ["--x"])
    assert command == [str(tmp_path / "airllm/bin/python"), "-m", "benchmarks.peers.airllm_runner", "run", "--x"]
    assert systems.SYSTEMS["airstream"].command(tmp_path, "run", [])[0] == sys.executable


def test_pins_are_compared_without_the_local_version():
    plain = torch.__version__.partition("+")[0]
    assert systems.has_requirements(Path(sys.executable), (f"torch=={plain}",))
    assert not systems.has_requirements(Path(sys.executable), (f"torch=={plain}.1",))
    assert not systems.has_requirements(Path(sys.executable), ("no-such-package==1.0",))


@needs_linux
def test_conditions_and_caption(tmp_path):
    write_checkpoint(tmp_path / "model", TINY)
    settings = parse_settings(None, [f"--checkpoint={tmp_path / 'model'}", *REQUIRED[1:]])
    context = conditions.describe(settings, [1e9, 2e9])
    json.dumps(context)
    assert context["model"]["weight_bytes"] == settings.weight_bytes > 0
    assert str(tmp_path) not in json.dumps(context)
    assert "bfloat16 weights, 3000 MiB of memory" in conditions.caption(context)
    assert "disk raw 1.00-2.00 GB/s" in conditions.caption(context)
    assert "weights, memory not limited, prompt" in conditions.caption(context | {"limit_mib": None})


# --- the runners' shared part


def request(tmp_path: Path) -> Request:
    return Request(tmp_path / "model", tmp_path / "work", [10, 11], num_tokens=2, budget_bytes=1 << 30)


def fake_generate(model: Any, request: Request, clock: TokenClock) -> list[int]:
    clock.put(request.prompt)  # as transformers does
    for token in model:
        clock.put(token)
    clock.end()
    return list(model)


@pytest.mark.parametrize("budget_bytes", [1 << 30, None])
@pytest.mark.parametrize("form", ["", "int4"])
def test_request_survives_the_command_line(tmp_path, budget_bytes, form):
    asked = replace(request(tmp_path), budget_bytes=budget_bytes, form=form)
    assert measure.parse(["run", *asked.arguments()]) == ("run", asked)


def test_runner_prints_its_record_last(tmp_path, capsys):
    runner = Runner("fake", ("pytest",), lambda _: [7, 8], fake_generate, details=lambda model: {"size": len(model)})
    measure.main(runner, ["run", *request(tmp_path).arguments()])
    printed = report.parse_record(capsys.readouterr().out)
    assert printed.tokens == [7, 8]
    assert printed.version == f"pytest {pytest.__version__}"
    assert printed.details["size"] == 2
    assert 0 < printed.load_seconds <= printed.ttft_seconds


def test_wrong_number_of_tokens_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="fake made 3 tokens and 3 ticks of the clock where 1 x 2 were asked for"):
        measure.measure(Runner("fake", (), lambda _: [7, 8, 9], fake_generate), request(tmp_path))


def test_preparation_is_done_once_and_its_cost_stays_on_record(tmp_path):
    calls = []

    def prepare(request: Request) -> None:
        calls.append(request)
        (request.work / "copy").write_bytes(b"12345")

    runner = Runner("fake", (), lambda _: [7, 8], fake_generate, prepare)
    first, second = (measure.prepare_once(runner, request(tmp_path)) for _ in range(2))
    assert first == second
    assert len(calls) == 1
    assert measure.measure(runner, request(tmp_path)).prepare_disk_bytes == 5


def test_a_failed_preparation_is_done_again(tmp_path):
    def fail(_: Request) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        measure.prepare_once(Runner("fake", (), lambda _: [], fake_generate, fail), request(tmp_path))
    assert not (tmp_path / "work" / measure.PREPARED_NAME).exists()


# --- checkpoints


def test_checkpoint_is_complete_and_deterministic(tmp_path):
    total = write_checkpoint(tmp_path / "a", TINY, seed=1, max_shard_bytes=10_000)
    write_checkpoint(tmp_path / "b", TINY, seed=1, max_shard_bytes=10_000)
    write_checkpoint(tmp_path / "c", TINY, seed=2, max_shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert any((tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes() for file in files)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    tensors = {
        name: tensor
        for file in files
        if file.endswith("safetensors")
        for name, tensor in load_file(tmp_path / "a" / file).items()
    }
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == total == sum(tensor.nbytes for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_checkpoint_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "left over").touch()
    write_checkpoint(tmp_path / "model", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "left over").exists()
    with pytest.raises(FileExistsError, match="remove it"):
        write_checkpoint(tmp_path / "model", TINY)


def test_shards_are_filled_in_order():
    sizes = {name: torch.Size([count]) for name, count in [("a", 3), ("b", 2), ("c", 9), ("d", 1)]}
    assert shard_names(sizes, max_shard_bytes=10) == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("text", ["1,2,3", "16,32,2,300,4,x", "16,32,0,300,4,2", "16,32,2,300,5,1", "16,32,2,300,4,3"])
def test_impossible_shapes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="shape"):
        Shape.parse(text)


def test_shape_survives_its_text():
    assert Shape.parse(str(TINY)) == TINY


def test_checkpoint_key_follows_the_files(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = checkpoint_key(tmp_path / "model")
    assert before == checkpoint_key(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert before != checkpoint_key(tmp_path / "model")


# --- the law


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A whole checkpoint that nobody changes."""
    folder = tmp_path_factory.mktemp("law") / "model"
    write_checkpoint(folder, TINY)
    return folder


def measured(seconds: float, pass_bytes: int = 0, rate: float = 2e9, **fields: Any) -> Measured:
    """A run that took `seconds` a token and streamed `pass_bytes` for each over a link of `rate`."""
    plain: dict[str, Any] = {
        "tokens": [1, 2, 3],
        "token_seconds": [seconds, seconds],
        "pass_bytes": pass_bytes,
        "planned_pass_bytes": pass_bytes,
        "link": [(pass_bytes, pass_bytes / rate)] * 2 if pass_bytes else [],
        "stall_seconds": 0.5,
        "predicted_seconds": None,
        "assumed_rates": [],
        "planned_peak_bytes": 2_000_000_000,
        "peak_rise_bytes": 1_900_000_000,
        "is_direct": True,
        "version": "airstream 0.1.0",
    }
    return Measured(**plain | fields)


LAW_BUDGETS = [
    Budget(0.0, 0.0, 1 << 30, 4 * 10**9),
    Budget(0.9, 0.9, 4 << 30, 4 * 10**9),
    Budget(1.0, 1.0, 5 << 30, 4 * 10**9),
]


def law_runs() -> list[LawRun]:
    """Two turns: streaming everything takes 2 s at the link's rate, computing 0.5 s and then 0.6 s."""
    return [
        LawRun(0.0, 1, measured(2.1, 4 * 10**9, predicted_seconds=2.0)),
        LawRun(0.9, 1, measured(0.51, 4 * 10**8)),
        LawRun(1.0, 1, measured(0.5)),
        LawRun(1.0, 2, measured(0.6)),
        LawRun(0.0, 2, error="exit status 1: no luck"),
        LawRun(0.9, 2, measured(0.75, 4 * 10**8)),
    ]


def law_cliff() -> Cliff:
    limits = law_report.cliff_limits([0.0, 1.0], 100 << 20, 6 * 10**9, 8000)
    peers = [replace(run, system="llamacpp 0%") for run in runs_of("llamacpp", 1.0, decode_seconds_per_token=5.0)]
    return Cliff(limits, 100 << 20, 6 * 10**9, [*peers, Run("llamacpp 100%", 1, error="timed out")])


def law_results() -> dict[str, Any]:
    context = {
        "machine": {"cpu": "EPYC", "cores": 2},
        "model": {"weight_bytes": 6 * 10**9, "dtype": "bfloat16", "model_type": "llama"},
        "turns": 2,
    }
    return law_report.as_json(context, law_runs(), LAW_BUDGETS, law_cliff())


def test_law_is_the_slower_of_link_and_compute():
    assert law_report.bound_seconds(measured(9.0, 4 * 10**9), 0.5) == 2.0
    assert law_report.bound_seconds(measured(9.0, 4 * 10**8), 0.5) == 0.5
    assert law_report.bound_seconds(measured(9.0), 0.5) == 0.5
    assert law_report.bound_seconds(measured(9.0, 4 * 10**9), None) == 2.0


def test_link_rate_weighs_before_and_after_by_their_time():
    assert measured(1.0, 1, link=[(10, 1.0), (10, 4.0)]).link_rate == 4.0
    assert measured(1.0).link_rate is None


def test_compute_time_is_of_the_same_turn_or_of_all():
    runs = law_runs()
    assert [law_report.compute_seconds(runs, turn) for turn in (1, 2, 3)] == [0.5, 0.6, 0.55]
    assert law_report.compute_seconds(runs[:2], 1) is None


def test_points_of_the_law():
    streamed, mixed, resident = law_report.summarise(law_runs(), LAW_BUDGETS)
    assert streamed["ratio"]["median"] == pytest.approx(1.05)
    assert streamed["predicted_seconds"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert streamed["holds"]
    assert mixed["ratio"]["min"] == pytest.approx(0.51 / 0.5)
    assert mixed["ratio"]["max"] == pytest.approx(0.75 / 0.6)
    assert not mixed["holds"]
    assert mixed["predicted_seconds"] is None
    assert resident["link_bytes_per_second"] is None
    assert resident["ratio"]["median"] == 1.0


def test_law_survives_json_and_fails_in_full():
    results = law_results()
    assert json.loads(json.dumps(results))["points"] == results["points"]
    assert results["tokens_equal"]
    assert results["llamacpp"]["points"][0] == {
        "share": 0.0,
        "limit_mib": 100,
        "seconds_per_token": {"median": 5.0, "min": 5.0, "max": 5.0},
    }
    assert results["llamacpp"]["points"][1]["seconds_per_token"] is None
    lines = law_report.markdown_table(results).splitlines()
    assert lines[2] == "| 0.0% | 1.07 | 4.00 | 2.10 | 2.00 | 2.00 | 1.05 | 2.00 | 2.00 | 1.90 |"
    assert lines[8:10] == ["| 0% | 100 | 5.00 |", "| 100% | 8000 | - |"]
    assert law_report.markdown_table(results | {"assumed_rates": ["disk"]}).count("not measured here: disk.") == 1
    assert lines[11:] == ["* airstream 0%, turn 2: exit status 1: no luck", "* llamacpp 100%, turn 1: timed out"]


def test_budgets_come_closest_to_the_shares():
    def pass_bytes(mib: int) -> int | None:
        """Nothing is read ahead below 10 MiB; then every 4 MiB more keep 4 of 80 bytes."""
        return None if mib < 10 else max(80 - (mib - 10) // 4 * 4, 0)

    chosen = law_child.choose_budgets(pass_bytes, [0.0, 0.26, 1.0], most_mib=200)
    assert [budget.max_memory_bytes >> 20 for budget in chosen] == [13, 33, 200]
    assert [budget.share for budget in chosen] == [0.0, 0.25, 1.0]
    assert {budget.full_pass_bytes for budget in chosen} == {80}


def test_budgets_where_nothing_is_ever_streamed():
    (budget,) = law_child.choose_budgets(lambda mib: 0, [0.5], most_mib=200)
    assert (budget.share, budget.max_memory_bytes) == (1.0, 1 << 20)


def test_budgets_by_airstreams_own_plan(tiny_checkpoint):
    pass_bytes = law_child.planned_pass_bytes(tiny_checkpoint, max_context=16)
    assert pass_bytes(1) is None  # a budget that is too small
    assert pass_bytes(200) is not None


@needs_linux
def test_one_run_of_the_law(tiny_checkpoint, tmp_path):
    asked = Request(tiny_checkpoint, tmp_path, [10, 11], num_tokens=4, budget_bytes=200 << 20)
    run = law_child.measure(asked)
    assert len(run.tokens) == 4
    assert len(run.token_seconds) == 3
    assert run.is_direct
    assert str(tiny_checkpoint.parent) not in json.dumps(asdict(run))


@needs_linux
def test_airstream_runs_with_a_codec_that_was_prepared(tiny_checkpoint, tmp_path):
    asked = Request(tiny_checkpoint, tmp_path, [10, 11], num_tokens=2, budget_bytes=200 << 20, form="lossless")
    airstream_runner.prepare(asked)
    assert (tmp_path / "lossless" / "config.json").is_file()
    with airstream_runner.load(asked) as model:
        assert "fast" in str(model.plan)
        assert len(measure.generate_with_transformers(model, asked, TokenClock())) == 2


def test_pass_clock_notes_the_bytes_of_every_tick():
    counts = iter([100, 250])
    clock = law_child.PassClock(streamed_bytes=lambda: next(counts))
    clock.tick()
    clock.tick()
    assert clock.streamed == [100, 250]
    assert len(clock.seconds) == 2


@needs_linux
@pytest.mark.parametrize("is_cold", [True, False])
def test_the_law_from_its_command_line(tiny_checkpoint, tmp_path, monkeypatch, capsys, is_cold):

    def execute(command, timeout_seconds, limit_mib=None):
        is_choice = "budgets" in command
        answer = [asdict(LAW_BUDGETS[0])] if is_choice else asdict(measured(2.0, 4 * 10**9))
        failed = not is_choice and execute.num_measured == 1
        execute.num_measured += not is_choice
        return limited.Outcome(int(failed), 1.0, 0, None), f"chatter\n{json.dumps(answer)}\n", "last words"

    def drop_page_cache():
        if not is_cold:
            raise PermissionError("not root")

    execute.num_measured = 0
    monkeypatch.setattr(launch, "execute", execute)
    monkeypatch.setattr(limited, "drop_page_cache", drop_page_cache)
    out = tmp_path / "law.json"
    assert law.main([f"--checkpoint={tiny_checkpoint}", "--turns=2", "--shares=0", f"--out={out}"]) == 0
    results = json.loads(out.read_text())
    assert [run["error"] for run in results["runs"]] == [None, "exit status 1: last words"]
    assert results["points"][0]["ratio"]["median"] == 1.0
    assert results["cache_state"].startswith("page cache dropped" if is_cold else "page cache as it was")
    assert str(tiny_checkpoint.parent) not in out.read_text()
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == results
    assert "[2/2] turn 2 airstream 0%: FAILED, exit status 1: last words" in printed.err


def test_a_law_that_cannot_begin(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(limited, "drop_page_cache", lambda: None)
    monkeypatch.setattr(launch, "execute", lambda *_: (limited.Outcome(1, 1.0, 0, None), "", "no such thing"))
    assert law.main([f"--checkpoint={tiny_checkpoint}"]) == 1
    assert "no budgets: exit status 1: no such thing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--shares=0,101", "not a list of per cent"),
        ("--shares=some", "not a list of per cent"),
        ("--llamacpp", "needs --venvs and --work"),
        ("--tokens=1", "ask for 2 or more"),
    ],
)
def test_laws_that_make_no_sense_are_refused(extra, message, capsys):
    with pytest.raises(SystemExit):
        law.parse_settings(["--checkpoint=model", extra])
    assert message in capsys.readouterr().err


def test_line_of_the_law_has_its_corner():
    points = json.loads(json.dumps(law_results()["points"]))
    shares, seconds = plot_law.law_line(points, steps=10)
    assert shares == pytest.approx([0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100])
    assert seconds[:2] == pytest.approx([2.0, 1.8])
    assert seconds[-2:] == pytest.approx([0.55, 0.55])


def test_line_of_the_law_without_streaming():
    (resident,) = law_report.summarise([LawRun(1.0, 1, measured(0.5))], LAW_BUDGETS)
    assert plot_law.law_line([resident]) == ([0.0, 100.0], [0.5, 0.5])


@pytest.mark.parametrize("is_linear", [False, True])
def test_a_picture_of_the_law(tmp_path, is_linear):
    pytest.importorskip("matplotlib")
    (tmp_path / "law.json").write_text(json.dumps(law_results()))
    plot_law.main([str(tmp_path / "law.json"), str(tmp_path / "law.png"), *(["--linear"] if is_linear else [])])
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_a_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plot_law.draw(law_results(), tmp_path / "law.png")
    assert law.main(["--checkpoint=model", "--plot=law.png"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


# --- GGUF (needs the gguf package)


def test_gguf_holds_the_same_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    from benchmarks.peers import gguf_export

    write_checkpoint(tmp_path / "model", TINY)
    gguf_export.write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    tensors = dict(gguf_export.read_tensors(tmp_path / "model"))
    assert len(stored) == len(tensors)
    for name, data in tensors.items():
        rows = data
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = gguf_export.permute(data, TINY.heads if "q_proj" in name else TINY.kv_heads)
        kept = stored[gguf_export.gguf_name(name)].data
        assert (kept == 1.0).all() if data.ndim == 1 else kept.tobytes() == rows.tobytes()


# --- airstream against the disk


@needs_linux
def test_streaming_from_its_command_line(tmp_path, capsys):
    """Two turns, each in a process of its own, in so little memory that they have something to stream."""
    folder = tmp_path / "model"
    write_checkpoint(folder, replace(TINY, hidden=256, intermediate=1024, layers=8))
    budget = smallest_budget(folder, max_context=7, max_batch_size=1)["cpu"]
    counts = ["--turns=2", "--prompt-tokens=4", "--new-tokens=3"]
    stream.main([f"--checkpoint={folder}", f"--max-memory={budget}", *counts])
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == list(stream.ROWS.values())
    results = json.loads(last)
    assert [turn["tokens"] for turn in results["turns"]] == [results["turns"][0]["tokens"]] * 2
    assert all(turn["streamed_bytes"] > 0 for turn in results["turns"])
    assert results["settings"] == {
        "limit_mib": None,
        "max_memory": budget,
        "device": "cpu",
        "page_cache": False,
        "turns": 2,
        "prompt_tokens": 4,
        "new_tokens": 3,
    }
    assert str(tmp_path) not in last


# --- the folders

FAMILIES = {"law", "quality", "stream", "suite"}
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_family_imports_what_it_shares_and_no_other_family(file):
    """What they share imports none: it would not be beside them."""
    own = file.relative_to(ROOT).parts[1]
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    inside = [
        f"{getattr(node, 'module', '')}.{alias.name}".strip(".").split(".") for node in nodes for alias in node.names
    ]
    imported = {name[1] for name in inside if name[0] == "benchmarks"}
    assert imported & FAMILIES <= {own}


def test_the_comparison_needs_no_large_library():
    """A child inherits its parent's peak RSS, so the parent must stay small."""
    program = "import sys, benchmarks.suite.__main__, benchmarks.law.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_narrower_shape_has_as_many_tensors(tmp_path: Path) -> None:
    for shape, narrower in startup.NARROWER.items():
        configs = []
        for times in (1, narrower):
            startup.write_config(shape, tmp_path, times)
            configs.append(json.loads((tmp_path / "config.json").read_text()))
        real, narrow = configs
        assert {name for name in real if real[name] != narrow[name]} == set(startup.WIDTHS)
        assert all(narrow[name] * narrower == real[name] for name in startup.WIDTHS)


# --- planned and measured memory


FOUND = {
    "planned_bytes": 100 << 20,
    "measured_bytes": 90 << 20,
    "lines": {"ring": 0, "runtime": 60 << 20, "KV cache": 40 << 20},
}
CALL = memory.Call("tiny", "float32", "sdpa", True, 0, 1, 3000)


@pytest.mark.parametrize(
    ("found", "ending"),
    [
        (FOUND, "100.0     90.0  0.90  runtime 60%, KV cache 40%"),
        (FOUND | {"measured_bytes": None}, "100.0  not made"),
        ({"error": "BudgetError: no"}, "failed: BudgetError: no"),
    ],
)
def test_a_row_of_memory(found, ending):
    assert memory.row(CALL, found).endswith(ending)
    assert memory.row(CALL, found).startswith(CALL.describe())


def test_shapes_of_memory_are_known(capsys):
    with pytest.raises(SystemExit):
        memory.main(["--shapes", "tiny,vast"])
    assert "no such shape: vast" in capsys.readouterr().err


@needs_linux
def test_memory_from_its_command_line(tmp_path, capsys):
    """The chunk of 64 tokens is for the longer prompt alone, which is planned to need more than the limit."""
    options = ["--shapes=tiny", "--dtypes=float32", "--attentions=sdpa", "--padded=yes", f"--work={tmp_path}", "--json"]
    memory.main([*options, "--tokens=40,30000", "--chunks=64", "--limit=64MiB"])
    *_, line, last = capsys.readouterr().out.splitlines()
    (result,) = json.loads(last)["results"]
    assert "error" not in result, result
    assert line.endswith("not made")
    assert result["measured_bytes"] is None
    assert not list(tmp_path.iterdir())
    memory.write_checkpoint("tiny", "float32", tmp_path)
    found = memory.measure(replace(CALL, tokens=40), tmp_path, 1 << 30)
    assert found["planned_bytes"] == sum(found["lines"].values())
    assert 0 < found["measured_bytes"] <= found["planned_bytes"]
