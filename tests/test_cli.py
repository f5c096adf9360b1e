"""The command line, called as a user would, on a tiny checkpoint."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from airstream import ArgumentError, Plan
from airstream.cli import main
from airstream.cli.chat import Conversation
from airstream.cli.parser import build_parser, generation_options, load_options, parse_memory
from tests.conftest import WriteTiny, stream
from tests.tiny_models import tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def folder(tiny: WriteTiny, tmp_path: Path) -> Path:
    """A tiny llama with a chat template."""
    source = tiny("llama", torch.bfloat16)
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def run(*words: Any) -> int:
    return main([str(word) for word in (*words, "--device", "cpu")])


def test_generate_prints_the_continuation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", folder, "w5 w6 w7", "--max-new-tokens", 5) == 0
    with stream(folder) as model:
        inputs = model.tokenizer("w5 w6 w7", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, 3:]
        expected = model.tokenizer.decode(ids, skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_generate_reads_the_prompt_from_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("generate", folder, "w5 w6 w7", "--json", "--max-new-tokens", 3)
    given = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w6 w7"))
    run("generate", folder, "-", "--json", "--max-new-tokens", 3)
    assert json.loads(capsys.readouterr().out)["text"] == given["text"]


def test_json_has_text_and_costs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("generate", folder, "w5 w6", "--json", "--max-new-tokens", 4, "--max-memory", "200MiB", "--layers-per-batch", 1)
    result = json.loads(capsys.readouterr().out)
    assert result["new_tokens"] == 4
    assert result["prompt_tokens"] == 2
    assert result["streamed_bytes"] > 0
    assert result["budget_bytes"] == 200 << 20
    assert 0 < result["ttft_seconds"] <= result["total_seconds"]


def test_stats_go_to_standard_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("generate", folder, "w5 w6", "--max-new-tokens", 2, "--stats", "--chat")
    printed = capsys.readouterr()
    assert "waiting for weights" in printed.err
    assert "waiting for weights" not in printed.out


def test_profile_trace_and_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, plot = tmp_path / "run.json", tmp_path / "run.png"
    words = ("--max-new-tokens", 3, "--profile", "--trace", trace, "--plot", plot)
    assert run("generate", folder, "w5 w6", *words) == 0
    out, err = capsys.readouterr()
    assert "seconds per pass" in err
    assert "seconds per pass" not in out
    assert json.loads(trace.read_text())["traceEvents"]
    assert plot.stat().st_size > 10_000
    run("generate", folder, "w5 w6", "--max-new-tokens", 3, "--profile", "--json")
    assert json.loads(capsys.readouterr().out)["profile"]["new_tokens"] == 3


@pytest.mark.parametrize("option", ["--trace", "--plot"])
def test_a_file_that_cannot_be_written_is_told_before_anything_runs(
    option: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", folder, "w5", option, tmp_path / "missing" / "run.png") == 1
    out, err = capsys.readouterr()
    assert not out
    assert "there is no folder" in err


def test_sampling_is_repeatable_with_a_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: int) -> str:
        run("generate", folder, "w5 w6", "--max-new-tokens", 12, "--temperature", 1.5, "--seed", seed)
        return capsys.readouterr().out

    assert sample(1) == sample(1) != sample(2)


def test_plan_prints_and_round_trips(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", folder, "--max-memory", "cpu=300MiB")
    assert "300 MiB (given)" in capsys.readouterr().out
    run("plan", folder, "--max-memory", "300MiB", "--json")
    plan = Plan.from_json(capsys.readouterr().out)
    assert plan.tiers["cpu"].budget_bytes == 300 << 20


def test_an_error_is_one_line_and_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "./not/there") == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "not/there" in printed.err
    assert not printed.out


def test_a_question_too_many_for_a_plain_model(tiny: WriteTiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", tiny("gpt2", torch.bfloat16), "w5", "--chat") == 1
    assert "no chat template" in capsys.readouterr().err


def test_chat_answers_each_line_until_an_empty_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w6\nw9\n\nw11\n"))
    assert run("chat", folder, "--max-new-tokens", 3) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2


def test_chat_keeps_its_cache_and_answers_as_without(folder: Path) -> None:
    with stream(folder) as model:
        kept = Conversation(model, "w3", {"max_new_tokens": 4, "do_sample": False})
        replies = [kept.answer("w5 w6"), kept.answer("w7 w8 w9"), kept.answer("w10")]
        assert kept._cache is not None
        assert kept._cache.get_seq_length() == len(kept._cached_ids)
        fresh = Conversation(model, "w3", {"max_new_tokens": 4, "do_sample": False})
        fresh._reusable_cache = lambda _: DynamicCache(config=model.config)  # type: ignore[method-assign]
        assert [fresh.answer("w5 w6"), fresh.answer("w7 w8 w9"), fresh.answer("w10")] == replies


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(folder: Path) -> None:
    class Impatient:
        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                raise KeyboardInterrupt

        def end(self) -> None:
            raise AssertionError

    with stream(folder) as model:
        conversation = Conversation(model, None, {"max_new_tokens": 4, "do_sample": False})
        first = conversation.answer("w5 w6")
        with pytest.raises(KeyboardInterrupt):
            conversation.answer("w8 w9", Impatient())
        interrupted = conversation.answer("w7")
        undisturbed = Conversation(model, None, {"max_new_tokens": 4, "do_sample": False})
        assert undisturbed.answer("w5 w6") == first
        assert undisturbed.answer("w7") == interrupted


def test_memory_by_name() -> None:
    assert parse_memory(["4GiB"]) == "4GiB"
    assert parse_memory(["0=4GiB", "cpu=8GiB"]) == {0: "4GiB", "cpu": "8GiB"}
    with pytest.raises(ArgumentError, match="which is which"):
        parse_memory(["4GiB", "8GiB"])


def test_every_loading_argument_reaches_from_pretrained() -> None:
    words = "generate m p --max-memory 1GiB --dtype float16 --max-context 7 --max-batch-size 2 --layers-per-batch 3"
    words += " --prefetch-batches auto --no-page-cache --attn-implementation eager --revision r --token t"
    words += " --cache-dir c --local-files-only --trust-remote-code --device cpu"
    arguments = build_parser().parse_args(words.split())
    assert load_options(arguments) == {
        "max_memory": "1GiB",
        "dtype": "float16",
        "max_context": 7,
        "max_batch_size": 2,
        "layers_per_batch": 3,
        "prefetch_batches": "auto",
        "page_cache": False,
        "attn_implementation": "eager",
        "revision": "r",
        "token": "t",
        "cache_dir": "c",
        "local_files_only": True,
        "trust_remote_code": True,
        "device": "cpu",
    }
    assert load_options(build_parser().parse_args(["plan", "m"])) == {}


def test_greedy_unless_sampling_is_asked_for() -> None:
    def options(*words: str) -> dict[str, Any]:
        arguments: argparse.Namespace = build_parser().parse_args(["generate", "m", "p", *words])
        return generation_options(arguments)

    assert options() == {"max_new_tokens": 256, "do_sample": False}
    assert options("--top-p", "0.9") == {"max_new_tokens": 256, "do_sample": True, "top_p": 0.9}


def test_python_dash_m_is_the_same_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "airstream", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("airstream ")
