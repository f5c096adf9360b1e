"""The command line, called as a user would, on a tiny checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, GenerationConfig

from airstream import ArgumentError, AutoModel, CheckpointNotFoundError, Plan
from airstream.cli import demo, main, reading
from airstream.cli.mistakes import check_sampling
from airstream.cli.options import load_options
from airstream.cli.output import able_to_write
from airstream.cli.parser import build_parser
from airstream.cli.reading import prompt_of, typed
from airstream.cli.sampling import Choice, choose
from airstream.cli.stopping import Holding
from airstream.cli.values import DTYPES, parse_memory
from airstream.cli.wording import OPTIONS, as_options
from airstream.loading.options import LoadOptions
from tests.conftest import WriteTiny, least_memory, stream
from tests.stand_ins.tiny_models import tiny_tokenizer

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


@pytest.mark.parametrize(("max_context", "is_told"), [(8, True), (12, True), (13, False), (64, False)])
def test_a_context_that_was_exceeded_is_told(
    max_context: int, is_told: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = " ".join(["w5"] * 11)
    assert run("generate", folder, prompt, "--max-new-tokens", 2, "--max-context", max_context) == 0
    told = f"--max-context {max_context} is what memory was planned for, and no limit: prompt and answer took 13 tokens"
    assert (told in capsys.readouterr().err) == is_told


@pytest.mark.parametrize(("num_words", "is_told"), [(253, True), (252, False)])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_goes_beyond_the_models_positions_is_told(
    command: str,
    num_words: int,
    is_told: bool,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = " ".join(["w5"] * num_words)
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    given = (prompt, "--json") if command == "generate" else ("--seed", 1)
    assert run(command, folder, *given, "--max-new-tokens", 4) == 0
    told = "the model was made for 256 tokens: prompt and answer took 257 tokens, and the last may make no sense"
    assert (told in capsys.readouterr().err) == is_told


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


@pytest.mark.parametrize("temperature", ["1e-6", "1e6"])
@pytest.mark.parametrize("penalty", ["1e-6", "1e6"])
def test_whatever_is_taken_for_sampling_leaves_probabilities(folder: Path, temperature: str, penalty: str) -> None:
    """torch draws from no others."""
    words = ("--temperature", temperature, "--repetition-penalty", penalty)
    run("generate", folder, "w5 w6", "--max-new-tokens", 4, *words)


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


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertModel])
def test_a_model_that_generates_no_text_is_refused_before_its_weights_are_read(
    command: str, cls: type, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airstream.auto.Engine", None)  # whoever loads fails
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    cls(config).save_pretrained(tmp_path / "bertcls")
    assert run(command, tmp_path / "bertcls", *(["w5"] if command == "generate" else [])) == 1
    err = capsys.readouterr().err
    assert f"bertcls is a {cls.__name__}, which generates no text: from Python, AutoModel.from_pretrained(...)" in err
    assert err.count("\n") == 1


def test_memory_by_name() -> None:
    assert parse_memory(["4GiB"]) == "4GiB"
    assert parse_memory(["0=4GiB", "cpu=8GiB"]) == {0: "4GiB", "cpu": "8GiB"}
    with pytest.raises(ArgumentError, match="which is which"):
        parse_memory(["4GiB", "8GiB"])


def test_the_dtypes_named_are_those_that_models_compute_in() -> None:
    for name in DTYPES:
        LoadOptions(dtype=name)
    assert {str(each).removeprefix("torch.") for each in vars(torch).values() if isinstance(each, torch.dtype)} & {
        *DTYPES
    } == {"bfloat16", "float16", "float32", "float64"}


def test_errors_know_every_option_that_python_has_as_an_argument() -> None:
    """By its name in Python; else a message of the command line would tell users what they cannot type."""
    parser = build_parser("0")
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    named = {action.dest for command in commands.choices.values() for action in command._actions}
    arguments = {option.name for option in dataclasses.fields(LoadOptions)}
    assert (named & arguments) <= set(OPTIONS)


def test_every_loading_argument_reaches_from_pretrained() -> None:
    words = "generate m p --max-memory 1GiB --dtype float16 --max-context 7 --max-batch-size 2 --layers-per-batch 3"
    words += " --prefetch-batches auto --no-page-cache --attn-implementation eager --revision r --token t"
    words += " --cache-dir c --local-files-only --trust-remote-code --device cpu"
    arguments = build_parser("0.1.0").parse_args(words.split())
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
    assert load_options(build_parser("0.1.0").parse_args(["plan", "m"])) == {}


def options_of(*words: str, checkpoint: Any = None, samples_by_default: bool = False) -> Choice:
    arguments: argparse.Namespace = build_parser("0.1.0").parse_args(["generate", "m", "p", *words])
    return choose(arguments, checkpoint or GenerationConfig(), samples_by_default)


GREEDY = {"max_new_tokens": 256, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
SUGGESTING = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, num_beams=4)


@pytest.mark.parametrize(
    ("words", "checkpoint", "by_default", "differs", "said"),
    [
        ("", None, False, {}, "greedy"),
        ("", SUGGESTING, False, {}, "greedy"),
        ("", SUGGESTING, True, {"do_sample": True}, "sampling, temperature 0.6, top k 20, seed 7"),
        ("", None, True, {}, "greedy"),
        ("--greedy", SUGGESTING, True, {}, "greedy"),
        ("--sample", SUGGESTING, False, {"do_sample": True}, "sampling, temperature 0.6, top k 20, seed 7"),
        ("--temperature 0", SUGGESTING, True, {}, "greedy"),
        (
            "--temperature 1.5 --top-p 0.9 --top-k 5 --min-p 0.1",
            None,
            False,
            {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
            "sampling, temperature 1.5, top p 0.9, top k 5, min p 0.1, seed 7",
        ),
        ("--repetition-penalty 1.1", None, False, {"repetition_penalty": 1.1}, "greedy, repetition penalty 1.1"),
        ("--prefill-chunk-size 16", None, False, {"prefill_chunk_size": 16}, "greedy"),
    ],
)
def test_how_tokens_are_chosen(
    words: str, checkpoint: Any, by_default: bool, differs: dict[str, Any], said: str
) -> None:
    choice = options_of(*words.split(), "--seed", "7", checkpoint=checkpoint, samples_by_default=by_default)
    assert choice == Choice(GREEDY | differs, said)


@pytest.mark.parametrize("words", ["--temperature 0 --top-p 0.9", "--greedy --min-p 0.1", "--temperature 0 --sample"])
def test_what_has_no_effect_is_refused(words: str) -> None:
    with pytest.raises(ArgumentError, match="leave one of them out"):
        check_sampling(build_parser("0.1.0").parse_args(["generate", "m", "p", *words.split()]))


MISTAKES = [
    ("--max-new-tokens 0", "must be a whole number at least 1"),
    ("--max-new-tokens 1.5", "must be a whole number"),
    ("--temperature -1", "must be a number at least 1e-06 and at most 1000000, or 0"),
    ("--temperature 1e-40", "must be a number at least 1e-06"),
    ("--temperature 1e300", "at most 1000000"),
    ("--repetition-penalty 1e-40", "must be a number at least 1e-06 and at most 1000000 "),
    ("--repetition-penalty 1e300", "at most 1000000"),
    ("--temperature nan", "must be a number"),
    ("--temperature inf", "must be a number"),
    ("--top-p 2", "must be a number above 0 and at most 1"),
    ("--top-p 0", "above 0"),
    ("--top-k -1", "at least 0"),
    ("--min-p 1.1", "at most 1"),
    ("--repetition-penalty 0", "at least 1e-06"),
    ("--seed -1", "at least 0"),
    (f"--seed {1 << 64}", "at most"),
    ("--greedy --sample", "not allowed with"),
    ("--layers-per-batch many", "must be a whole number at least 1, or auto"),
    ("--layers-per-batch 0", "must be a whole number at least 1, or auto"),
    ("--prefetch-batches -1", "must be a whole number at least 0, or auto"),
    ("--max-context x", "must be a whole number at least 1"),
    ("--max-batch-size 0", "must be a whole number at least 1"),
    ("--nope", "unrecognized arguments: --nope (`airstream "),
    ("--max_context 2", "did you mean --max-context?"),
    ("--Max_Memory=4GiB", "did you mean --max-memory?"),
    ("-n 5", "did you mean --max-new-tokens?"),
    ("-c 512 --n-gpu-layers 9", "did you mean --max-context and --max-memory?"),
    ("-m llama", "did you mean MODEL without an option?"),
    ("--device-map auto", "--device-map is of other programs. One device computes, which --device names"),
    ("--device-map=balanced", "--device-map is of other programs. One device computes"),
    ("--device-map cuda:0", "did you mean --device?"),
    ("--torch-dtype bf16", "did you mean --dtype?"),
    ("--load-in-4bit", "did you mean --compression?"),
    (
        "--quantization nf4",
        "--quantization is of other programs. Name how the weights are to be packed, --c",
    ),
    *(
        (
            f"{option} 4",
            f"{option} is of other programs. Torch's threads compute, one for each core: set OMP_NUM_THREADS=",
        )
        for option in ("--threads", "--n-threads", "-t", "--num-threads", "--threads-batch")
    ),
    ("--low-cpu-mem-usage", "Leave it out: weights are never in memory all at once"),
    ("--gpu-memory-utilization 0.9", "Name the memory that may be used, --max-memory 4GiB or --max-memory 0=4GiB cpu="),
    ("--dtype int8", "'int8' is not a type that models compute in"),
    ("--dtype bfloat", "not a type that models compute in"),
    ("--max-memory 4GX", "'4GX' is not a size"),
    ("--max-memory cpu=4GX", "'4GX' is not a size"),
    ("--max-memory 4", 'did you mean "4GiB"?'),
    ("--max-memory gpu=4GiB", "the memory is called cpu, or 0"),
    ("--device cuda:x", "'cuda:x' is not a device"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "m", "p", *words.split()])
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


WITHOUT_TORCH = """
import contextlib, io, json, sys

sys.modules["torch"] = sys.modules["transformers"] = None  # whoever imports them fails
from airstream.cli import main

told = []
for words in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(words)
        except SystemExit as exit:
            status = exit.code
    told.append([status, err.getvalue()])
print(json.dumps(told))
"""

AT_ONCE = [
    ("", 2, "the following arguments are required: COMMAND"),
    ("generat m p", 2, "invalid choice: 'generat'"),
    ("genrate m p", 2, "did you mean generate? (`airstream --help` says more)"),
    ("Chat m", 2, "did you mean chat?"),
    ("plan m --table --format txt", 2, "did you mean text?"),
    ("generate -m m -p hi", 2, "did you mean MODEL without an option and PROMPT in quotes without an option?"),
    ("generate m p --max_new_tokens 2", 2, "did you mean --max-new-tokens? (`airstream generate --help` says more)"),
    ("plan m -n 5", 2, "unrecognized arguments: -n 5 (`airstream plan --help` says more)"),
    *((f"generate m p {words}", 2, said) for words, said in MISTAKES),
    *((f"chat m {words}", 2, said) for words, said in MISTAKES),
    ("generate m", 1, "give one prompt"),
    ("generate m p -f x", 1, "give one prompt"),
    ("generate m -f ./not/there", 1, "No such file"),
    ("generate ./not/there p", 1, "there is no folder './not/there'"),
    ("chat ~/not/there.gguf", 1, "there is no file '~/not/there.gguf'"),
    ("generate m p --greedy --temperature 0.7", 1, "leave one of them out"),
    ("chat m --greedy --temperature 0.7", 1, "leave one of them out"),
    ("chat m --temperature 0 --top-k 3", 1, "leave one of them out"),
    ("chat m --max-memory 4GiB --max-memory 5GiB", 1, "say which is which"),
    ("plan m --max-memory cpu=4GiB cpu=5GiB", 1, "cpu has 4GiB already"),
    ("plan m --max-memory 0=4GiB --device cpu", 1, "is of an accelerator"),
    ("generate m p --trace not/there/run.json", 1, "there is no folder"),
    ("generate m p --plot not/there/run.png", 1, "there is no folder"),
    ("generate m p --plot run.txt", 1, "no kind of picture"),
    ("plan m --plot run.txt", 1, "no kind of picture"),
    ("plan m n", 1, "--table"),
    ("plan m --gpu 3090,4090", 1, "--table"),
    ("plan m --table --plot x.png", 1, "no effect on a table"),
    ("plan m --format csv", 1, "no effect on one plan"),
    ("plan m --gpu 4O90", 1, "did you mean"),
    ("plan m --table --gpu 3090,4O90", 1, "did you mean"),
    ("plan m --gpu 3090 --device cpu", 1, "both name what computes"),
    ("plan m --ram much", 2, "'much' is not a size"),
    ("plan m --ram 64", 2, "argument --ram: '64' is 64 B, in which no model runs; did you mean \"64GiB\"?"),
    ("plan m --ram 65536", 2, 'did you mean "65536MiB"?'),
    ("plan m --disk-gbps 0", 2, "must be a number above 0"),
    ("plan m --prompt-tokens 0", 2, "at least 1"),
    ("plan m --prompt-tokens 9 --max-context 8", 1, "do not fit into --max-context 8"),
    ("plan ./not/there", 1, "there is no folder"),
    ("verify ./not/there", 1, "there is no folder"),
    ("verify m --deep --quick", 1, "leave one of them out"),
    ("repack ./not/there out", 1, "there is no folder"),
    ("repack m out --layers 5", 2, "names no layers: 5:6 is layer 5 alone, 5: all from 5 on, :5 those before"),
    ("repack m out --layers 5:5", 2, "names no layers: 5:6 is layer 5"),
    ("repack m out --layers 9:5", 2, "names no layers: 5:9 are layers 5 to 8"),
    ("repack m out --layers 5-9", 2, "names no layers: 5:10 are layers 5 to 9"),
    ("repack m out --layers all", 2, "names no layers: 5:15 are layers 5 to 14"),
    (
        "repack m out --shard-size 1",
        2,
        "'1' is 1 B, and layers, which are not cut, are larger: name 1.0 MiB at least",
    ),
    ("repack m out --shard-size 4KiB", 2, "name 1.0 MiB at least"),
    (f"repack {'x' * 300}/y/z ../{'x' * 300}", 1, "x"),
    ("repack m out --shard-size big", 2, "'big' is not a size"),
    *((f"{words} {{empty}}", 1, "has no checkpoint: expected model.safetensors, ") for words in ("chat", "verify")),
    ("generate {empty} p", 1, "has no checkpoint: expected model.safetensors, "),
    ("generate {empty} p --variant fp16", 1, "has no checkpoint of --variant fp16: expected model.fp16.safetensors, "),
    ("repack {empty} out", 1, "has no checkpoint: expected model.safetensors, "),
    ("plan {empty}", 1, "has no config.json: it is not the folder of a transformers model"),
    ("plan --table {config} {empty}", 1, "has no config.json"),
    ("plan {empty} --subfolder x", 1, "has no folder 'x', which --subfolder names"),
    ("generate {config} p", 1, "has no checkpoint: expected model.safetensors, "),
    ("generate {weights} p", 1, "has no config.json"),
    ("repack {weights} out", 1, "has no config.json"),
    ("chat {adapter}", 1, "has no checkpoint"),
    ("plan {adapter}", 1, "is an adapter, not a model"),
    ("chat {file}", 1, "is a file: name the folder of a checkpoint"),
    ("generate {empty} p --gguf-file x.gguf", 1, "has no file 'x.gguf'"),
    ("hardware {file}", 1, "is a file: name a folder on the disk to measure"),
    ("hardware {empty}/x", 1, "is not a folder: name one on the disk that is to be measured"),
    ("cache --json --clear", 1, "leave one of them out"),
    ("demo --max-memory lots", 2, "'lots' is not a size"),
    ("demo --max-memory 200", 2, 'did you mean "200GiB"?'),
]
"""What the command line alone shows to be wrong, or what lies under the names in it."""

LACKING = {"empty": "", "config": "config.json", "weights": "model.safetensors", "adapter": "adapter_config.json"}
"""Folders that are no models, and what is in them."""


def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    for name, file in LACKING.items():
        (tmp_path / name).mkdir()
        if file:
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "file").touch()
    here = {name: str(tmp_path / name) for name in (*LACKING, "file")}
    told = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps([words.format(**here).split() for words, _, _ in AT_ONCE]),
        capture_output=True,
        text=True,
        check=True,
    )
    for (words, status, said), (got, err) in zip(AT_ONCE, json.loads(told.stdout), strict=True):
        assert said in err, words
        assert got == status, words
        assert err.count("\n") == 1, words


@pytest.mark.parametrize("words", [[], ["--traceback"]])
def test_who_names_no_command_is_shown_all_of_them(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="2"):
        main(words)
    listed = capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    helped = capsys.readouterr().out
    known = re.findall(r"^    (\w+)  ", helped, re.MULTILINE)
    assert len(known) >= 7
    for name in known:
        (line,) = (line for line in listed if line.split()[:1] == [name])
        assert len(line) <= 80
        assert line.split(maxsplit=1)[1] in helped  # whole, on one line there as well


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("LLAMA-bfloat16", "./llama-bfloat16"),
        ("llama_bfloat16", "./llama-bfloat16"),
        ("./llama-bfloat", "./llama-bfloat16"),
        ("models/Qwen2", "models/qwen2"),
        ("./models/qwn2", "models/qwen2"),
        ("tiny-q4.gguf", "./Tiny-Q4.gguf"),
        ("./other", ""),
    ],
)
def test_a_name_that_is_nearly_that_of_something_here(
    typed: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("llama-bfloat16", "models/qwen2"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Tiny-Q4.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert run("generate", typed, "hi", "--local-files-only") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert (f"Did you mean {meant!r}?" in err) if meant else ("Did you mean" not in err)


@pytest.mark.parametrize("command", ["generate", "repack"])
def test_swapped_arguments_are_told_in_the_right_order(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").touch()
    for model in (str(folder), str(tmp_path / "m.gguf"), "some/model"):
        words = ["Once upon a time"] if command == "generate" else ["./new folder"]
        assert main([command, *words, model]) == 1
        assert (
            f"the model comes first, as in `airstream {command} {shlex.join([model, *words])}`"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize("prompt", ["x" * 5000, "a\0b", "~nobody-here/x"])
def test_no_text_is_taken_for_a_path_that_fails(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([prompt, prompt], ["./" + prompt, prompt]):
        assert main(["generate", *words]) == 1
        err = capsys.readouterr().err
        assert "--traceback" not in err
        assert err.count("\n") == 1


def test_no_prompt_is_told_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("\n")
    (endless := tmp_path / "endless").touch()
    os.truncate(endless, reading.MAX_PROMPT + 1)  # as devices seem to be
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for words, said in (
        ([""], "the prompt is empty"),
        (["-"], "the prompt is empty"),
        ([], "give one prompt"),
        (["p", "-f", "x"], "give one prompt"),
        (["-f", tmp_path / "missing"], "No such file"),
        (["-f", tmp_path], "cannot be read"),
        (["-f", tmp_path / "bytes"], "not UTF-8"),
        (["-f", tmp_path / "empty"], "the prompt is empty"),
        (["-f", endless], "has more than 64.0 MiB, which no model takes"),
    ):
        assert run("generate", "not-there", *words) == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--trace", "--plot"])
def test_what_is_no_file_is_not_written_over(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    os.mkfifo(tmp_path / "run.png")
    assert run("generate", "not-there", "p", option, tmp_path / "run.png") == 1
    err = capsys.readouterr().err
    assert "run.png cannot be written: it is a pipe" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("piped", ["x" * 101, "x\\\n" * 60, '"""\n' + "x\n" * 120])
def test_standard_input_that_does_not_end_is_not_read_for_ever(piped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_PROMPT", 100)
    for read in (lambda: prompt_of("-", None), lambda: list(typed())):
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        with pytest.raises(ArgumentError, match="has more than 100 B"):
            read()


NAMELESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a pipe"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "is a link to 'nowhere', which leads nowhere"),
    "loop": (lambda path: path.symlink_to(path.name), "is a link that leads in a circle"),
    "pipe.gguf": (os.mkfifo, "is a pipe"),
    "loop.gguf": (lambda path: path.symlink_to(path.name), "is a link that leads in a circle"),
    "file/x": (lambda path: path.parent.touch(), "is in no folder: 'file' is a file"),
    "file/x/y": (lambda path: path.parents[1].touch(), "is in no folder: 'file' is a file"),
}
"""What lies under the name of a model, and what is said of it."""


@pytest.mark.parametrize("name", NAMELESS)
@pytest.mark.parametrize("prefix", ["", "./"])
def test_what_lies_under_the_name_of_a_model_is_said(
    name: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = NAMELESS[name]
    make(Path(name))
    assert run("plan", prefix + name, "--local-files-only") == 1
    err = capsys.readouterr().err
    assert said.lower() in err.lower()
    assert err.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file of which nothing can be read")
def test_a_file_that_cannot_be_read_is_no_fault_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "/proc/self/mem") == 1
    err = capsys.readouterr().err
    assert "'/proc/self/mem' cannot be read: Input/output error" in err
    assert "--traceback" not in err


def test_a_prompt_without_tokens_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", folder, " ") == 1
    assert "has no tokens" in capsys.readouterr().err


def test_what_other_libraries_raise_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the kernel\n  is gone")

    monkeypatch.setattr("airstream.cli.generate.load", fail)
    assert run("generate", "m", "p") == 1
    err = capsys.readouterr().err
    assert "RuntimeError: the kernel is gone" in err
    assert err.count("\n") == 1
    with pytest.raises(RuntimeError, match="is gone"):
        run("--traceback", "generate", "m", "p")


def test_a_prompt_in_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("w5 w6\n", encoding="utf-8")
    run("generate", folder, "-f", tmp_path / "prompt.txt", "--json", "--max-new-tokens", 2)
    result = json.loads(capsys.readouterr().out)
    assert result["prompt"] == "w5 w6"
    assert result["prompt_token_ids"] == [5, 6]
    run("generate", folder, "w6", "--system", "w5", "--json", "--max-new-tokens", 2)
    assert json.loads(capsys.readouterr().out)["prompt_token_ids"] == [5, 6]


def test_why_it_ended_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", folder, "w5 w6", "--max-new-tokens", 12, "--temperature", 3, "--seed", 5)
    assert run(*words) == 0
    out, err = capsys.readouterr()
    assert err == "(sampling, temperature 3, top k 50, seed 5; stopped at 12 tokens: --max-new-tokens allows more)\n"
    run(*words, "--json")
    whole = json.loads(capsys.readouterr().out)
    assert whole["finish_reason"] == "length"
    assert len(whole["token_ids"]) == 12
    assert whole["text"].strip() == out.strip()
    stop = whole["text"].split()[4]
    before = whole["text"][: whole["text"].index(f"{stop}")]
    run(*words, "--json", "--stop", "no such text", "--stop", stop)
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == before
    assert stopped["token_ids"] == whole["token_ids"][: len(stopped["token_ids"])]
    assert len(stopped["token_ids"]) < 12
    run(*words, "--stop", stop)
    out, err = capsys.readouterr()
    assert out.strip() == before.strip()
    assert "complete" in err


def test_a_stop_is_never_shown_however_the_text_comes() -> None:
    text, stops = "one two STOP three", ["STOP", "TOP!"]
    for cuts in itertools.combinations(range(1, len(text)), 2):
        holding = Holding(stops)
        pieces = [text[start:end] for start, end in itertools.pairwise((0, *cuts, len(text)))]
        shown = [holding.pass_on(piece, is_last=piece is pieces[-1]) for piece in pieces]
        assert "".join(shown) == "one two "
    assert Holding(stops).pass_on("one STO", is_last=False) == "one "
    assert Holding(stops).pass_on("one STO", is_last=True) == "one STO"


@pytest.mark.parametrize(
    ("device", "has_room", "theirs", "status", "said"),
    [
        ("cpu", True, [7, 8], 0, "The same 2 tokens as transformers"),
        ("cpu", True, [7, 9], 1, "NOT the tokens of transformers"),
        ("cpu", False, None, 0, "not enough free memory"),
        ("cuda:0", True, None, 0, "rounds otherwise than cuda:0"),
        ("cpu", True, KeyboardInterrupt, 0, "interrupted"),
    ],
)
def test_the_demo_says_honestly_whether_it_was_compared(
    device: str,
    has_room: bool,
    theirs: Any,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(*_: object) -> Any:
        if theirs is KeyboardInterrupt:
            raise KeyboardInterrupt
        assert theirs is not None, "transformers was asked"
        return theirs

    monkeypatch.setattr(demo, "has_room", lambda: has_room)
    monkeypatch.setattr(demo, "answer_of_transformers", answer)
    plan: Any = types.SimpleNamespace(device=device)
    report: Any = types.SimpleNamespace(prompt_tokens=2, total_seconds=7.4)
    assert demo._check(plan, Path("m.gguf"), torch.tensor([[5, 6, 7, 8]]), report) == status
    err = capsys.readouterr().err
    assert said in err
    assert ("airstream: checking, about 17 s: " in err) is (theirs is not None), "no terminal: a line, beforehand"
    assert "\r" not in err
    assert "\x1b" not in err


def test_a_folder_without_tokenizer_says_what_to_copy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    assert run("generate", folder, "w5") == 1
    err = capsys.readouterr().err
    assert f"{folder} has no tokenizer beside its weights: copy tokenizer.json" in err
    assert err.count("\n") == 1
    with (
        AutoModel.from_pretrained(folder, device="cpu") as model,
        pytest.raises(CheckpointNotFoundError, match=r"has no tokenizer beside its weights: copy tokenizer\.json"),
    ):
        _ = model.tokenizer


def test_python_dash_m_is_the_same_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "airstream", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("airstream ")


@pytest.mark.parametrize(
    "words",
    [
        ["MODEL", "PROMPT", "--max-new-tokens", "2", "--max-memory", "4GiB"],
        ["MODEL", "--max-new-tokens", "2", "--max-memory", "4GiB", "PROMPT"],
        ["--max-memory", "4GiB", "MODEL", "--max-new-tokens", "2", "PROMPT"],
        ["--max-new-tokens=2", "--max-memory=4GiB", "MODEL", "PROMPT"],
        ["--max-memory", "0=3GiB", "cpu=4GiB", "MODEL", "--max-new-tokens", "2", "PROMPT"],
    ],
)
def test_arguments_stand_wherever_one_writes_them(words: list[str]) -> None:
    arguments = build_parser("0.1.0").parse_args(["generate", *words])
    assert (arguments.model, arguments.prompt, arguments.max_new_tokens) == ("MODEL", "PROMPT", 2)
    expected = {0: "3GiB", "cpu": "4GiB"} if "cpu=4GiB" in words else "4GiB"
    assert load_options(arguments)["max_memory"] == expected


def test_a_prompt_without_quotes_is_told_to_have_some(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser("0.1.0").parse_args(["generate", "MODEL", "Once", "upon", "a", "time"])
    assert "upon a time: a prompt of several words stands in quotes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ('is max_memory={"cpu": "192MiB"}', "is --max-memory 192MiB"),
        ('max_memory={0: "4GiB", "cpu": "8GiB"}', "--max-memory 0=4GiB cpu=8GiB"),
        ('a smaller max_memory={"cpu": ...}, below', "a smaller --max-memory cpu=..., below"),
        ("from_pretrained(..., max_batch_size=...) plans", "--max-batch-size ... plans"),
        ("device='cuda:9' is not there", "--device cuda:9 is not there"),
        ("pass trust_remote_code=True if", "pass --trust-remote-code if"),
        ("which subfolder= names", "which --subfolder names"),
        ("max_memory gives 200 MiB", "--max-memory gives 200 MiB"),
        ("help: generate(..., prefill_chunk_size=949) reads", "help: --prefill-chunk-size 949 reads"),
        ("max_new_tokens=20 would fit", "--max-new-tokens 20 would fit"),
        (
            'are `"attn_implementation=sdpa"`, `attn_implementation="eager"`',
            "are `--attn-implementation sdpa`, `--attn-implementation eager`",
        ),
        ('say "dtype=float16 or', 'say "--dtype float16 or'),
        ("/data/max_memory/x", "/data/max_memory/x"),
        ('With kernels="fast" it would', "With --kernels fast it would"),
    ],
)
def test_errors_are_in_the_words_of_the_command_line(message: str, said: str) -> None:
    assert as_options(message) == said


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_prompt_that_is_too_long_is_read_in_the_pieces_that_are_advised(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = " ".join(f"w{number % 90 + 5}" for number in range(200))

    def answer(*words: Any) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(prompt + "\nw7\n"))
        common = ("--max-new-tokens", 3, "--layers-per-batch", 1, "--prefetch-batches", 0)
        run(command, folder, *([prompt] if command == "generate" else []), *common, *words)
        out, err = capsys.readouterr()
        return out, err

    monkeypatch.setattr("airstream.plan.refusal.MIN_CHUNK", 1)
    few = {"max_context": 8, "layers_per_batch": 1, "prefetch_batches": 0}
    short = ("--max-context", 8, "--max-memory", least_memory(folder, **few)["cpu"] + (200 << 10))
    said = answer(*short)[1]
    (chunk,) = re.findall(r"--prefill-chunk-size (\d+) reads a prompt of this length in pieces that fit", said)
    given, whole = answer(*short, "--prefill-chunk-size", chunk)[0], answer()[0]
    assert given == whole
    assert len(given.split()) > 2


def test_a_budget_that_is_too_small_names_the_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", folder, "w5", "--max-memory", "1MiB") == 1
    err = capsys.readouterr().err
    assert "that would do" in err
    assert " is --max-memory " in err
    assert "max_memory" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_output_that_cannot_be_written_is_told(unbuffered: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | unbuffered
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "airstream", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment,
        )
    assert result.returncode == 1
    assert result.stderr == "airstream: standard output cannot be written: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes files")
@pytest.mark.parametrize(
    ("closed", "status", "out", "err"),
    [
        (">&-", 1, "", "airstream: standard output is closed: nothing could be shown\n"),
        ("2>&-", 1, "", ""),
        (">&- 2>&-", 1, "", ""),
    ],
)
def test_standard_streams_that_are_closed(closed: str, status: int, out: str, err: str) -> None:
    shell = ["sh", "-c", f'exec "$0" -m airstream "$@" {closed}', sys.executable, "plan", "./not/there"]
    result = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (status, out, err)


@pytest.mark.parametrize("is_unbuffered", [False, True])
def test_what_an_encoding_lacks_is_written_by_its_number(is_unbuffered: bool, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb", buffering=0 if is_unbuffered else -1) as file:
        given: Any = io.TextIOWrapper(file, "ascii", write_through=is_unbuffered)
        with contextlib.redirect_stdout(given), able_to_write():
            sys.stdout.write("gr\udcc3\udcb6\xdfe \U0001f389 ")  # as Python names a file that is not ASCII
        given.write("end")
        given.flush()
    assert (tmp_path / "out").read_bytes() == b"gr\xc3\xb6\\xdfe \\U0001f389 end"


def test_a_plan_is_printed_where_output_is_ascii(tiny: WriteTiny, tmp_path: Path) -> None:
    (tmp_path / "größe").symlink_to(tiny("llama", torch.bfloat16))
    written = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(written, "ascii")):
        assert run("plan", tmp_path / "größe") == 0
        assert b"gr\\xf6\\xdfe" in written.getvalue()


def test_a_locale_that_a_library_cannot_do_with_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        b"\xe2".decode("ascii")

    monkeypatch.setattr("airstream.cli.generate.load", fail)
    monkeypatch.setattr("airstream.cli._encoding", lambda: "ascii")
    assert run("generate", "m", "p") == 1
    err = capsys.readouterr().err
    assert "set PYTHONUTF8=1" in err
    assert err.count("\n") == 1


def test_a_demo_without_a_question_and_rates_of_a_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for words, said in ((["demo", " "], "question is empty"), (["hardware", tmp_path / "file"], "is a file")):
        assert run(*words) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("called", "is_found", "typed"),
    [
        (".venv/bin/airstream", False, ".venv/bin/airstream"),
        (".venv/bin/airstream", True, "airstream"),
        ("somewhere/airstream/__main__.py", False, "airstream"),
    ],
)
def test_what_to_type_next_can_be_typed(
    called: str, is_found: bool, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the environment is not activated, as after the first command of the README."""
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr("shutil.which", lambda _: "/bin/airstream" if is_found else None)
    assert demo.program() == typed


ROOT = Path(__file__).parents[2]

READ = """
import sys
from airstream.cli.reading import prompt_of, typed
from airstream.errors import ArgumentError
try:
    print(ascii((prompt_of(sys.argv[1], None), list(typed()))))
except ArgumentError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes files")
@pytest.mark.parametrize(
    ("words", "stdin", "read"),
    [
        ("-", "<&-", "there is no standard input to read the prompt from"),
        ("hi", "<&-", "('hi', [])"),
        ("-", "</dev/null", "the prompt is empty: give some text to continue"),
        ("Größe", "</dev/null", ascii(("Größe", []))),
    ],
)
def test_prompts_without_standard_input_and_of_a_locale_that_knows_ascii_alone(
    words: str, stdin: str, read: str
) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    environment = plain | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    shell = ["sh", "-c", f'exec "$0" "$@" {stdin}', sys.executable, "-c", READ, words]
    result = subprocess.run(shell, env=environment, capture_output=True, check=True)
    assert result.stdout.decode() == f"{read}\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize(
    ("piped", "read"),
    [
        (b"caf\xc3\xa9\n", ascii(("café\n", []))),
        (b"caf\xe9", "standard input is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position 3"),
    ],
)
def test_standard_input_is_utf8_whatever_the_locale(piped: bytes, read: str, encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READ, "-"]
    result = subprocess.run(command, env=environment, input=piped, capture_output=True, check=True)
    assert result.stdout.decode().startswith(read)


def test_a_text_that_is_not_utf8_is_told_and_the_next_one_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\ncaf\xc3\xa9\n"), "ascii"))
    assert list(typed()) == ["café"]
    assert "what was typed is not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["p\udce9"], ["p", "--system", "\udce9"], ["p", "--stop", "\udce9"]])
def test_bytes_of_the_command_line_that_are_no_text_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["generate", "m", *words])
    except SystemExit as end:
        status = int(str(end.code))
    assert status > 0
    assert "is not UTF-8 text" in capsys.readouterr().err
