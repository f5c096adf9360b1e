"""What a checkpoint would become by a codec is planned for as what it does become is, from its config alone as well."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import airstream
from airstream import ArgumentError, AutoModel, Machine, UnsupportedError
from airstream.cli import main
from airstream.loading.prepare import prepare_for_planning
from airstream.plan.facts import BatchFacts, ModelFacts
from airstream.plan.planner import smallest_plan
from tests.compat.test_quantising import packages
from tests.repacking.test_quantise import BY_CODEC, wide  # noqa: F401 - `wide` is a fixture
from tests.stand_ins.comparing import BF16, FP16, FP32

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what transformers and the formats' packages warn of is theirs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MACHINE = Machine(ram="2GiB", disk_gbps=1.0)
WideModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is packed for a plan."""
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "cache"))
    yield
    assert not (tmp_path / "cache" / "packed").exists()


def bare(folder: Path, to: Path) -> Path:
    """The config of `folder` and its tokenizer, without weights."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


def planned(folder: Path, machine: Machine = MACHINE, **options: Any) -> dict[str, Any]:
    """A plan as plain data, but for its name."""
    given = {"max_context": 64} | options | ({} if machine.gpu else {"device": "cpu"})
    plan = AutoModel.plan(folder, machine=machine, **given)
    data: dict[str, Any] = json.loads(plan.to_json())
    return {key: value for key, value in data.items() if key not in ("model", "would_help")}


QUANTISED = [
    *((codec, "llama", BF16) for codec in ("nf4", "int4", "int8", "fp8")),
    *((codec, "qwen2", FP16) for codec in ("nf4", "int4", "int8", "fp8")),
    ("nf4", "llama-tied", BF16), ("int8", "phi3", BF16), ("int4", "llama", FP32), ("fp8", "mixtral", BF16),
    ("fp8", "qwen3_moe", BF16), ("fp8", "deepseek_v3", BF16),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "name", "dtype"), QUANTISED)
def test_it_is_the_plan_of_what_is_made(
    wide: WideModel,  # noqa: F811 - a fixture
    tmp_path: Path,
    codec: str,
    name: str,
    dtype: Any,
) -> None:
    packages(codec)
    folder = wide(name, dtype)
    made = airstream.repack(folder, tmp_path / "made", codec=codec, progress=False)
    config_alone = bare(folder, tmp_path / "bare")
    asked = prepare_for_planning(made, {"device": "cpu", "max_context": 64}, MACHINE)
    least = smallest_plan(asked.facts, asked.request).peak_bytes["cpu"]
    for options in ({}, {"max_memory": least}, {"max_memory": least + 300_000}, {"dtype": "float32"}):
        real = planned(made, **options)
        assert planned(folder, **options, compression=codec) == real
        assert planned(config_alone, **options, compression=codec) == real


@BY_CODEC
def test_on_a_card_too(wide: WideModel, tmp_path: Path, codec: str) -> None:  # noqa: F811
    packages(codec)
    folder, card = wide("llama", BF16), Machine(gpu="RTX 3090", ram="8GiB", disk_gbps=1.0)
    made = airstream.repack(folder, tmp_path / "made", codec=codec, progress=False)
    assert planned(bare(folder, tmp_path / "bare"), card, compression=codec) == planned(made, card)


def facts_of(folder: Path, **options: Any) -> ModelFacts:
    return prepare_for_planning(folder, {"device": "cpu", **options}, MACHINE).facts


def names_of(batch: BatchFacts) -> list[tuple[str, ...]]:
    """The tensors that become resident together, in any order: that goes by how large they are."""
    return sorted(group.names for group in batch.groups)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "mixtral"])
def test_lossless_is_planned_as_trained_weights_pack(wide: WideModel, tmp_path: Path, name: str) -> None:  # noqa: F811
    """What each tensor packs to is in its values alone; all else is the same."""
    folder = wide(name, BF16)
    made = airstream.repack(folder, tmp_path / "made", codec="lossless", progress=False)
    real = facts_of(made)
    for source in (folder, bare(folder, tmp_path / "bare")):
        guessed = facts_of(source, compression="lossless")
        assert guessed.checkpoint_bytes == real.checkpoint_bytes
        assert guessed.arithmetic == real.arithmetic
        assert guessed.stored_bytes is not None
        assert real.stored_bytes == pytest.approx(guessed.stored_bytes, rel=0.08)
        assert real.stored_bytes <= 1.02 * guessed.stored_bytes
        for count, batches in real.batchings.items():
            assert [names_of(batch) for batch in batches] == [names_of(b) for b in guessed.batchings[count]]


@pytest.mark.parametrize("codec", ["nf4", "4bit", "int8", "int4"])
def test_a_package_that_a_plan_needs_is_named_with_the_extra_that_has_it(
    wide: WideModel,  # noqa: F811 - a fixture
    tmp_path: Path,
    codec: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config_alone = bare(wide("llama", BF16), tmp_path / "bare")
    missing = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "compressed_tensors": "compressed-tensors"}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in missing else find_spec(name, *more)
    )
    with pytest.raises(UnsupportedError, match='extra "quant" has it') as refusal:
        planned(config_alone, compression=codec)
    message = str(refusal.value)
    assert f"compression={codec!r}" in message
    assert any(f"pip install {package} " in message for package in missing.values())
    for other in ("lossless", "fp8"):
        assert planned(config_alone, compression=other)


def test_what_cannot_be_made_is_not_planned(wide: WideModel, tmp_path: Path) -> None:  # noqa: F811
    packages("nf4")
    with pytest.raises(UnsupportedError, match=r"experts of MixtralForCausalLM.* one format only, 'fp8'"):
        planned(bare(wide("mixtral", BF16), tmp_path / "bare"), compression="4bit")
    made = airstream.repack(wide("llama", BF16), tmp_path / "made", codec="fp8", progress=False)
    with pytest.raises(UnsupportedError, match=r"is quantised already \(fp8\)"):
        planned(made, compression="8bit")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ArgumentError, match=r"is not a codec: .*There is 'lossless'"):
        planned(tmp_path, compression="int5")


def test_the_command_line_calls_it_codec(
    wide: WideModel,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    packages("int4")
    folder = wide("llama", BF16)
    printed = []
    for option in ("--codec", "--compression"):
        words = ["plan", str(folder), option, "int4", "--device", "cpu", "--ram", "2GiB", "--disk-gbps", "1", "--json"]
        assert main(words) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert printed[0]["checkpoint_bytes"] == facts_of(folder, compression="int4").checkpoint_bytes


def described(folder: Path, width: int) -> Path:
    """The config of a model of 48 layers."""
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": width, "intermediate_size": 4096, "num_hidden_layers": 48}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 1024, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_would_help_names_codecs_lossless_first(tmp_path: Path) -> None:
    packages("nf4")
    packages("int8")
    folder = described(tmp_path / "config", 2048)
    card = Machine(gpu="RTX 2060", ram="1GiB", disk_gbps=1.0)
    options: dict[str, Any] = {"max_context": 64, "max_memory": {0: "1GiB"}}
    plan = AutoModel.plan(folder, machine=card, **options)
    first, second, third, *_ = plan.would_help
    assert first == 'compression="lossless" (equal to the bit)'
    assert (second, third) == ('compression="8bit" (rounds the weights)', 'compression="4bit" (rounds the weights)')
    packed = AutoModel.plan(folder, machine=card, **options, compression="4bit")
    assert plan.prediction is not None
    assert packed.prediction is not None
    factor = plan.prediction.decode_seconds / packed.prediction.decode_seconds
    assert plan.would_help[third] == pytest.approx(factor, abs=0.01)
    assert f"{third}: " in str(plan)
    assert "a token" in str(plan).partition(third)[2]
    assert not any("compression" in what for what in packed.would_help)


def test_a_cpu_is_told_of_what_its_time_is_predicted_for(tmp_path: Path) -> None:
    folder = described(tmp_path / "config", 1024)
    machine = Machine(ram="2GiB", disk_gbps=0.1)
    plan = AutoModel.plan(folder, device="cpu", machine=machine, max_context=64, max_memory="300MiB")
    assert [what for what in plan.would_help if "compression" in what] == ['compression="lossless" (equal to the bit)']
