"""Adapters that somebody has broken, or made to break us: one error that names the file, and the model as it was."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from airstream import AirstreamError, BudgetError, CheckpointError, CheckpointNotFoundError
from airstream.checkpoint.adapter_files import CONFIG, PICKLED_WEIGHTS, WEIGHTS, read_adapter_config
from tests.conftest import WriteTiny, stream
from tests.stand_ins.comparing import logits, prompts

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers for it
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]

IDS = prompts(1, 6)
DEEP: Any = json.loads("[" * 30 + "]" * 30)


@pytest.fixture(scope="module")
def model(tiny: WriteTiny) -> Iterator[Any]:
    with stream(tiny("llama", torch.float32), max_memory="64MiB") as model:
        yield model


@pytest.fixture(scope="module")
def sound(tiny: WriteTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that nobody has broken."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny("llama", torch.float32))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(sound: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


def assert_refused(model: Any, folder: Path, words: str, error: type[Exception] = AirstreamError) -> None:
    """By one error with these words, cheaply, and nothing of the adapter stays."""
    names = [name for name, _ in model.named_modules()]
    before = logits(model, IDS)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=words) as refusal:
            model.load_adapter(folder)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert isinstance(refusal.value, AirstreamError)
    assert len(str(refusal.value)) < 2_000
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model, IDS), before)


VALUES: list[tuple[str, Any]] = [
    ("r", 10**9),
    ("r", 10**90),
    ("r", -(10**9)),
    ("r", "x"),
    ("r", [4]),
    ("r", True),
    ("lora_alpha", "x"),
    ("lora_alpha", 10**30),
    ("lora_dropout", "x"),
    ("target_modules", 7),
    ("target_modules", [7]),
    ("target_modules", {"q_proj": 1}),
    ("target_modules", "(" * 20),
    ("target_modules", "(.*)*x"),
    ("target_modules", "(a+|[)]b){9,}x"),
    ("target_modules", ".*" * 30 + "x"),
    ("target_modules", "a" * 10_000),
    ("exclude_modules", "((q|k)+)+x"),
    ("layers_pattern", ["(.*)+x"]),
    ("rank_pattern", 7),
    ("rank_pattern", {"q_proj": 10**9}),
    ("rank_pattern", {"q_proj": "x"}),
    ("rank_pattern", {"(.*)*x": 4}),
    ("alpha_pattern", {"q_proj": 10**9}),
    ("alpha_pattern", ["q_proj"]),
    ("layers_to_transform", "x"),
    ("layers_to_transform", [10**9]),
    ("modules_to_save", 7),
    ("modules_to_save", [["lm_head"]]),
    ("trainable_token_indices", "x"),
    ("auto_mapping", 7),
    ("task_type", 7),
    ("bias", 7),
    ("eva_config", 7),
    ("layer_replication", [[0, 10**9]]),
    ("layer_replication", [[0, 2], [1, 2]]),
    ("megatron_config", {"a": 1}),
    ("peft_type", 7),
    ("peft_type", None),
    ("peft_type", "NOTHING"),
]
"""Of a field alone: the message names the file and the field."""


@pytest.mark.parametrize(("field", "value"), VALUES, ids=lambda value: str(value)[:24])
def test_a_broken_value_is_named(model: Any, broken: Path, field: str, value: Any) -> None:
    file = broken / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert_refused(model, broken, rf"{CONFIG}: {field} ")


STUMBLES: list[tuple[str, Any]] = [
    ("r", 0),
    ("r", None),
    ("r", 8),
    ("target_modules", []),
    ("target_modules", ["no such module"]),
    ("target_modules", None),
    ("rank_pattern", {"q_proj": -1}),
    ("lora_dropout", 10**5),
    ("bias", "x"),
    ("task_type", "x"),
    ("modules_to_save", ["q_proj", "lm_head"]),
    ("init_lora_weights", "x"),
    ("peft_type", "PREFIX_TUNING"),
    ("peft_type", "ADALORA"),
    ("peft_type", "VERA"),
    ("use_dora", True),
    ("target_parameters", ["no.such.parameter"]),
]
"""What only PEFT can judge, with this model."""


@pytest.mark.parametrize(("field", "value"), STUMBLES, ids=lambda value: str(value)[:24])
def test_what_peft_stumbles_over_is_named(model: Any, broken: Path, field: str, value: Any) -> None:
    file = broken / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert_refused(model, broken, "adapter")


TEXTS = {
    "empty": "",
    "half": '{"peft_type": "LO',
    "list": "[]",
    "deep": "[" * 100_000,
    "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
    "page": "<!DOCTYPE html><html></html>",
}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, PICKLED_WEIGHTS])
@pytest.mark.parametrize("text", TEXTS)
def test_a_file_that_is_something_else(model: Any, broken: Path, name: str, text: str) -> None:
    if name == PICKLED_WEIGHTS:
        (broken / WEIGHTS).unlink()
    (broken / name).write_text(TEXTS[text])
    assert_refused(model, broken, name, CheckpointError)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "folder", "huge"])
def test_no_file_at_all(model: Any, broken: Path, name: str, kind: str) -> None:
    """To open a pipe would wait for ever; a file with a hole is as large as it likes."""
    (broken / name).unlink()
    if kind == "pipe":
        os.mkfifo(broken / name)
    elif kind == "folder":
        (broken / name).mkdir()
    else:
        with (broken / name).open("wb") as file:
            file.truncate(20 << 30)
    assert_refused(model, broken, name, CheckpointError)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(model: Any, broken: Path, name: str) -> None:
    (broken / name).unlink()
    assert_refused(model, broken, name, CheckpointNotFoundError)


@pytest.mark.parametrize("left", [3, 100, -1])
def test_truncated_weights(model: Any, broken: Path, left: int) -> None:
    file = broken / WEIGHTS
    file.write_bytes(file.read_bytes()[:left])
    assert_refused(model, broken, WEIGHTS, CheckpointError)


def test_weights_that_memory_cannot_hold(model: Any, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airstream.model.adapter_source.available_host_bytes", lambda: 1_000)
    assert_refused(model, broken, r"the adapter in .* takes .* of memory are free", BudgetError)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_code_in_a_pickle_is_not_executed(model: Any, tiny: WriteTiny, broken: Path, how: str) -> None:
    """By whichever way the adapter is loaded."""
    (broken / WEIGHTS).unlink()
    file = broken / PICKLED_WEIGHTS
    evil = {"base_model.model.lm_head.lora_A.weight": Evil(broken / "executed")}
    if how == "pickle":
        file.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, file)
    assert_refused(model, broken, PICKLED_WEIGHTS, CheckpointError)
    with stream(tiny("llama", torch.float32), max_memory="64MiB") as other, pytest.raises(pickle.UnpicklingError):
        peft.PeftModel.from_pretrained(other, broken)  # leaves its wrappers in the model
    assert not (broken / "executed").exists()


def test_pickled_weights_are_loaded(model: Any, sound: Path, broken: Path) -> None:
    torch.save(load_file(broken / WEIGHTS), broken / PICKLED_WEIGHTS)
    (broken / WEIGHTS).unlink()
    results = []
    for folder in (sound, broken):
        model.load_adapter(folder)
        results.append(logits(model, IDS))
        model.delete_adapter("default")
    assert torch.equal(*results)
    assert not torch.equal(results[0], logits(model, IDS))


PATTERNS = [
    r".*\.(q|v)_proj",
    r".*layers\.\d+\.self_attn\.q_proj$",
    r"^(?!.*vision)(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)$",
    r"model\.layers\.[0-3]{1,}\.(?:self_attn)\.(?:[qk]_proj)",
    "all-linear",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_people_write_are_read(broken: Path, pattern: str) -> None:
    file = broken / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": pattern}))
    assert read_adapter_config(broken)["target_modules"] == pattern


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "LoKrConfig", "AdaLoraConfig", "OFTConfig"])
def test_what_peft_writes_by_itself_is_accepted(model: Any, tmp_path: Path, kind: str) -> None:
    """The types that its dataclasses name are those of what they save."""
    from airstream.model.adapter_source import Source

    more = {"feedforward_modules": []} if kind == "IA3Config" else {"total_step": 9} if kind == "AdaLoraConfig" else {}
    config = getattr(peft, kind)(target_modules=["q_proj"], **more)
    config.save_pretrained(tmp_path)
    assert type(Source(tmp_path, {}).config()) is type(config)


def test_peft_model_leaves_the_model_usable(model: Any, sound: Path, broken: Path) -> None:
    """PEFT reads and raises by itself there: the error is its own, and the model beside it computes as before."""
    file, before = broken / CONFIG, logits(model, IDS)
    for field, value in (("r", "x"), ("peft_type", "NOTHING"), ("target_modules", ["no such module"])):
        file.write_text(json.dumps(json.loads((sound / CONFIG).read_text()) | {field: value}))
        with pytest.raises((TypeError, KeyError, ValueError)):
            peft.PeftModel.from_pretrained(model, broken)
        assert torch.equal(logits(model, IDS), before)
