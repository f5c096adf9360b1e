"""Configs and folders made to do harm: refused with the name of what is wrong, at once, and in little memory."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from airstream import AirstreamError, AutoModel, CheckpointError
from airstream.checkpoint.config_file import MAX_CONFIG_BYTES, read_config_file
from airstream.checkpoint.formats import PICKLE_INDEX, open_checkpoint
from tests.conftest import WriteTiny

HUGE = 10**12


def with_config(source: Path, folder: Path, text: str, with_weights: bool = True) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        if with_weights or "safetensors" not in file.name:
            shutil.copy(file, folder)
    (folder / "config.json").write_text(text)
    return folder


FIELDS: list[tuple[str, str, Any]] = [
    ("llama", "hidden_size", -1),
    ("llama", "hidden_size", 0),
    ("llama", "hidden_size", HUGE),
    ("llama", "hidden_size", "64"),
    ("llama", "hidden_size", 64.5),
    ("llama", "num_hidden_layers", -3),
    ("llama", "num_hidden_layers", 10**8),
    ("llama", "vocab_size", -5),
    ("llama", "vocab_size", HUGE),
    ("llama", "num_attention_heads", 0),
    ("llama", "num_attention_heads", -4),
    ("llama", "num_attention_heads", HUGE),
    ("llama", "num_key_value_heads", 0),
    ("llama", "intermediate_size", HUGE),
    ("llama", "head_dim", -1),
    ("llama", "rms_norm_eps", "x"),
    ("llama", "hidden_act", "os.system"),
    ("llama", "model_type", "../llama"),
    ("llama", "model_type", ["llama"]),
    ("llama", "dtype", "os"),
    ("llama", "rope_parameters", 7),
    ("mixtral", "num_local_experts", HUGE),
    ("mixtral", "num_local_experts", -1),
    ("gpt2", "n_layer", 10**8),
    ("gpt2", "n_head", 0),
    ("gpt2", "n_embd", -64),
    ("gpt2", "n_positions", HUGE),
]


@pytest.mark.parametrize(("name", "field", "value"), FIELDS, ids=lambda value: str(value))
def test_absurd_configs(tiny: WriteTiny, tmp_path: Path, name: str, field: str, value: Any) -> None:
    source = tiny(name, torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    assert field in config or field in ("head_dim", "rope_parameters"), "else nothing would be changed"
    folder = with_config(source, tmp_path / "m", json.dumps(config | {field: value}))
    before, started = peak_bytes(), time.monotonic()
    with pytest.raises(AirstreamError) as caught:
        AutoModel.from_pretrained(folder, device="cpu", max_memory="8GiB")
    assert len(str(caught.value)) > 20
    assert time.monotonic() - started < 20
    assert peak_bytes() - before < 200 << 20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings"])
def test_absurd_sizes_without_weights_are_at_most_planned(tiny: WriteTiny, tmp_path: Path, field: str) -> None:
    source = tiny("llama", torch.bfloat16)
    config = json.loads((source / "config.json").read_text()) | {field: HUGE}
    folder = with_config(source, tmp_path / "m", json.dumps(config), with_weights=False)
    before = peak_bytes()
    try:
        AutoModel.plan(folder, device="cpu", max_memory="8GiB", max_context=64)
    except AirstreamError as error:
        assert "GiB" in str(error)  # noqa: PT017 - a model of that size may be planned, and does not fit
    assert peak_bytes() - before < 200 << 20


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"llama"', "[" * 99_999, '{"a":' * 99_999, "\xff"])
def test_configs_that_are_none(tiny: WriteTiny, tmp_path: Path, text: str) -> None:
    folder = with_config(tiny("llama", torch.bfloat16), tmp_path / "m", text)
    with pytest.raises(CheckpointError, match=r"config\.json is not a JSON object"):
        AutoModel.plan(folder, device="cpu")


def test_a_config_of_a_terabyte(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(MAX_CONFIG_BYTES + 1)  # sparse
    with pytest.raises(CheckpointError, match="it is not a config"):
        read_config_file(tmp_path / "config.json")


def test_absurd_numbers_deep_inside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": [{"num_layers": HUGE}]}))
    with pytest.raises(CheckpointError, match="num_layers is 1,000,000,000,000"):
        read_config_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 126, "num_attention_heads": 128, "pad_token_id": -1, "vocab_size": 262_144},
        {"n_layer": 0, "num_hidden_layers": 0, "sliding_window": -1, "max_position_embeddings": 10_485_760},
        {"n_routed_experts": 384, "num_image_tokens": -1, "depth": 32, "depths": [2, 2, 18, 2]},
    ],
)
def test_numbers_that_models_have(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_config_file(tmp_path / "config.json")


@pytest.mark.parametrize("shard", ["../x.bin", "/etc/passwd", "sub/x.bin", "..", "", "a\\x.bin", "x\0.bin", 5, None])
def test_an_index_of_pickles_that_leads_elsewhere(tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.bin")
    (folder / PICKLE_INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(folder)
