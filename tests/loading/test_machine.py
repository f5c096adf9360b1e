"""Plans for machines that are not this one, in Python and on the command line."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from airstream import ArgumentError, AutoModel, Machine
from airstream.cli import main
from airstream.reporting.units import GIB, MIB
from tests.conftest import WriteTiny

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "max_position_embeddings": 8192, "dtype": "bfloat16",
    },
    "falcon-180b": {
        "model_type": "falcon", "hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232,
        "num_kv_heads": 8, "new_decoder_architecture": True, "vocab_size": 65024, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with nothing but a config."""
    folders = {}
    for name, config in SHAPES.items():
        folders[name] = tmp_path_factory.mktemp("configs") / name
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps(config))
    return folders


def run(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    ("given", "option", "remedies"),
    [
        (["--ram", "100MiB", "--device", "cpu"], "--ram (90% of the 100 MiB of RAM", r"is --ram (\d+MiB)$"),
        (
            ["--ram", "2MiB", "--gpu", "1060"],
            "--ram (90% of the 2.0 MiB of RAM",
            r"is --ram (\d+MiB)$",
        ),
        (["--max-memory", "100MiB", "--device", "cpu"], "--max-memory gives", r"is --max-memory (\d+MiB)$"),
    ],
    ids=["ram", "ram and gpu", "max memory"],
)
def test_what_does_not_fit_a_machine_names_the_options_that_describe_it(
    given: list[str],
    option: str,
    remedies: str,
    configs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", configs["llama-3-8b"], "--max-context", 16]
    assert run(*words, *given) == 1
    err = capsys.readouterr().err
    assert option in err
    enough = re.search(remedies, err, re.MULTILINE)
    assert enough is not None, err
    assert run(*words, given[0], enough[1], *given[2:]) == 0
    assert ("max-memory" in err) == ("--max-memory" in given)


# ------------------------------------------------------------------------------------------------- for other machines


def test_a_plan_for_a_card_that_is_not_here(configs: dict[str, Path]) -> None:
    machine = Machine(gpu="rtx 3090", ram="64GiB", disk_gbps=3.5)
    plan = AutoModel.plan(configs["falcon-180b"], machine=machine, max_context=2048)
    assert plan.device == "cuda:0"
    assert plan.tiers["0"].budget_bytes == int(0.9 * 24 * GIB)
    assert plan.tiers["cpu"].budget_bytes == int(0.9 * 64 * GIB)
    assert plan.hosted_bytes > 40 * GIB
    assert plan.read_bytes == pytest.approx(plan.streamed_bytes - plan.hosted_bytes, rel=0.01)
    assert plan.prediction is not None
    assert plan.prediction.bottleneck == "disk"
    assert plan.prediction.decode_seconds == pytest.approx(plan.read_bytes / 3.5e9, rel=0.01)
    assert plan.would_help
    assert all(tier.peak_bytes >= 0.95 * tier.budget_bytes for tier in plan.tiers.values())


def test_published_sizes_of_falcon_180b(configs: dict[str, Path]) -> None:
    """80 layers, "about 340 GB" (of 2^30 bytes), five layers in about 21, sixteen cards of 24 to hold it."""
    plan = AutoModel.plan(configs["falcon-180b"], machine=Machine(gpu="RTX 3090", ram="1TiB"), max_context=2048)
    layers = [batch for batch in plan.batches if batch.units != ("lm_head",)]
    per_layer = (plan.checkpoint_bytes - 2 * 65024 * 14848 * 2) / 80
    assert len(layers) == 80
    assert plan.checkpoint_bytes / GIB == pytest.approx(340, rel=0.03)
    assert 5 * per_layer / GIB == pytest.approx(21, rel=0.03)
    assert -(-plan.checkpoint_bytes // int(0.9 * 24 * GIB)) == 16


def test_more_of_a_machine_is_never_slower(configs: dict[str, Path]) -> None:
    def seconds(**machine: Any) -> float:
        plan = AutoModel.plan(configs["llama-3-8b"], machine=Machine(**machine), max_context=2048)
        assert plan.prediction is not None
        return plan.prediction.decode_seconds

    base = {"gpu": "RTX 3060 12GB", "ram": "16GiB", "disk_gbps": 2.0}
    for better in ({"ram": "64GiB"}, {"disk_gbps": 7.0}, {"gpu": "RTX 3090"}):
        assert seconds(**(base | better)) <= seconds(**base)
    assert seconds(**(base | {"gpu": "RTX 4090"})) < 0.1 * seconds(**(base | {"gpu": "RTX 3050", "ram": "8GiB"}))


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"gpu": "RTX 3091"}, "RTX 3090"),
        ({"ram": "lots"}, "ram='lots'"),
        ({"ram": 64}, 'ram=64 is 64 B, in which no model runs; did you mean "64GiB"'),
        ({"disk_gbps": 0}, "disk_gbps=0"),
        ({"disk_gbps": float("nan")}, "disk_gbps=nan"),
    ],
)
def test_a_machine_that_makes_no_sense_is_refused(machine: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as refusal:
        Machine(**machine)
    assert said in str(refusal.value)


def test_a_card_and_a_device_contradict_each_other(configs: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match="both name what computes"):
        AutoModel.plan(configs["llama-3-8b"], machine=Machine(gpu="T4"), device="cpu")


def test_a_plan_needs_no_weights_and_changes_little_once_they_are_there(tiny: WriteTiny, tmp_path: Path) -> None:
    folder = tiny("llama", torch.bfloat16)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    options: dict[str, Any] = {"device": "cpu", "max_memory": "1GiB", "max_context": 64}
    imagined, real = AutoModel.plan(tmp_path, **options), AutoModel.plan(folder, **options)
    assert imagined.batches == real.batches
    assert imagined.peak_bytes == real.peak_bytes


# ----------------------------------------------------------------------------------------------------- the command line


def test_plan_for_another_machine(configs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", configs["llama-3-8b"], "--gpu", "3060", "--ram", "32GiB", "--disk-gbps", 3.5, "--context", 2048)
    assert run(*words, "--batch", 2, "--prompt-tokens", 100) == 0
    printed = capsys.readouterr().out
    assert "on cuda:0" in printed
    assert "2 sequences of 2,048 tokens" in printed
    assert "first token of 100 after" in printed
    assert "would help" in printed


def test_table_on_the_command_line(configs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "--table", *configs.values(), "--gpu", "T4,3090", "--ram", "64GiB", "--format", "csv")
    assert run(*words) == 0
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["card"] for row in read] == 8 * ["T4", "RTX 3090"]  # a dense one in six precisions, experts in two


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "RTX 3091"], "RTX 3090"),
        (["--gpu", "3090,4090"], "--table"),
        (["--prompt-tokens", "5000", "--context", "100"], "do not fit into --max-context 100"),
    ],
)
def test_mistakes_are_told(
    configs: dict[str, Path], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run("plan", configs["llama-3-8b"], *words) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("budget", "note"), [("8GiB", "given"), ("1TiB", "given, more than the 64.00 GiB of RAM")])
def test_a_budget_larger_than_the_machine_is_told(configs: dict[str, Path], budget: str, note: str) -> None:
    machine = Machine(ram="64GiB")
    plan = AutoModel.plan(configs["llama-3-8b"], machine=machine, max_memory=budget, device="cpu", max_context=128)
    assert plan.tiers["cpu"].budget_note == note


@pytest.mark.parametrize("given", [{"ram": "4GiB"}, {"gpu": "RTX 3090", "ram": "64GiB"}, {}])
def test_what_a_plan_does_not_use_of_a_memory_is_said(configs: dict[str, Path], given: dict[str, str]) -> None:
    device = {} if "gpu" in given else {"device": "cpu"}
    plan = AutoModel.plan(configs["llama-3-8b"], machine=Machine(**given), max_context=128, **device)
    for tier in plan.tiers.values():
        whole, left = re.findall(r"([\d.]+) ([MG])iB", tier.budget_note)
        nbytes = [float(size) * (GIB if unit == "G" else MIB) for size, unit in (whole, left)]
        assert tier.budget_bytes + nbytes[1] == pytest.approx(nbytes[0], rel=0.01)
        assert f"{tier.budget_note})" in str(plan)
        assert tier.budget_note.endswith(" left to others")
