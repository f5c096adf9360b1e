"""The parts of `benchmarks` that measure nothing: order, arithmetic, parsing, and what becomes of a failing peer."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import conditions, disk, limited, report, systems
from benchmarks.checkpoints import Shape, shard_names, write_checkpoint
from benchmarks.compare import ROOT, execute
from benchmarks.peers import measure
from benchmarks.peers.measure import Record, Request, Runner, TokenClock
from benchmarks.report import Reference, Run, Spread
from benchmarks.settings import checkpoint_key, parse_settings

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
        "| system | s/token | decode s/token | TTFT s | peak RSS GB | disk read GB | own copy GB "
        "| tokens equal to transformers's |"
    )
    assert lines[2] == "| a | 2.00 (1.00-3.00) | 0.75 | 2.00 | 2.00 | 3.00 | 0.00 | yes |"
    assert lines[3] == "| b | 4.00 | 0.75 | 2.00 | 2.00 | 3.00 | 0.00 | yes |"
    assert lines[4] == "| c | failed | - | - | - | - | - | - |"
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
    assert not _is_running(int(child.read_text()))


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # a killed orphan may wait for its reaper


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
    [("--systems=airllm,vllm", "unknown: vllm; known: airstream"), ("--budget-mib=4000", "not within the limit")],
)
def test_settings_that_make_no_sense_are_refused(extra, message, capsys):
    with pytest.raises(SystemExit):
        parse_settings(None, [*REQUIRED, extra])
    assert message in capsys.readouterr().err


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


# --- the runners' shared part


def request(tmp_path: Path) -> Request:
    return Request(tmp_path / "model", tmp_path / "work", [10, 11], num_tokens=2, budget_bytes=1 << 30)


def fake_generate(model: Any, request: Request, clock: TokenClock) -> list[int]:
    clock.put(request.prompt)  # as transformers does
    for token in model:
        clock.put(token)
    clock.end()
    return list(model)


def test_request_survives_the_command_line(tmp_path):
    assert measure.parse(["run", *request(tmp_path).arguments()]) == ("run", request(tmp_path))


def test_runner_prints_its_record_last(tmp_path, capsys):
    runner = Runner("fake", ("pytest",), lambda _: [7, 8], fake_generate, details=lambda model: {"size": len(model)})
    measure.main(runner, ["run", *request(tmp_path).arguments()])
    printed = report.parse_record(capsys.readouterr().out)
    assert printed.tokens == [7, 8]
    assert printed.version == f"pytest {pytest.__version__}"
    assert printed.details["size"] == 2
    assert 0 < printed.load_seconds <= printed.ttft_seconds


def test_wrong_number_of_tokens_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="fake made 3 tokens and 3 ticks of the clock where 2 were asked for"):
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


def test_the_comparison_needs_no_large_library():
    """A child inherits its parent's peak RSS, so the parent must stay small."""
    program = "import sys, benchmarks.compare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
