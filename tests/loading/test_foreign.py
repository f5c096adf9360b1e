"""Arguments of other libraries: honoured, let pass, or refused with what takes their place; never ignored silently."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config

import airstream
from airstream import ArgumentError, AutoModel, Machine, plan_table
from airstream.compat.asked_formats import read_asked
from airstream.errors import CheckpointNotFoundError, UnsupportedError
from airstream.loading.arguments import HARMLESS, HONOURED, REFUSED, adopt
from airstream.loading.prepare import DEFAULTS
from tests.conftest import WriteTiny

IDS = torch.tensor([[3, 4, 5, 6]])

HONOURED_AS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"torch_dtype": torch.float16}, {"dtype": torch.float16}),
    ({"torch_dtype": "auto"}, {"dtype": "auto"}),
    ({"torch_dtype": None}, {}),
    ({"hf_token": "hf_x"}, {"token": "hf_x"}),
    ({"use_auth_token": True}, {"token": True}),
    ({"device_map": "auto"}, {}),
    ({"device_map": "balanced"}, {}),
    ({"device_map": "sequential"}, {}),
    ({"device_map": None}, {}),
    ({"device_map": "cuda:0"}, {"device": "cuda:0"}),
    ({"device_map": 0}, {"device": 0}),
    ({"device_map": torch.device("cpu")}, {"device": torch.device("cpu")}),
    ({"device_map": {"": "cpu"}}, {"device": "cpu"}),
    ({"prefetching": True}, {}),
    ({"prefetching": False}, {"prefetch_batches": 0}),
    ({"prefetching": 0}, {"prefetch_batches": 0}),
    ({"prefetching": None, "load_in_4bit": None}, {}),
    ({"max_seq_len": 512}, {"max_context": 512}),
    ({"max_model_len": 512}, {"max_context": 512}),
    ({"n_ctx": 512}, {"max_context": 512}),
    ({"n_ctx": 0}, {}),
    ({"gpu_batch_size": 4}, {"max_batch_size": 4}),
    ({"load_in_4bit": True, "load_in_8bit": False}, {"compression": "4bit"}),
    ({"load_in_8bit": True}, {"compression": "8bit"}),
    ({"quantization_config": None}, {}),
    ({"quantization_config": {"quant_method": "fp8"}}, {"compression": read_asked(FineGrainedFP8Config())}),
]


@pytest.mark.parametrize(("foreign", "ours"), HONOURED_AS, ids=str)
def test_what_means_the_same_is_honoured(
    foreign: dict[str, Any], ours: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert adopt(foreign, {}, DEFAULTS) == ours
    assert not caplog.records


def test_every_name_is_in_one_table_and_tried() -> None:
    assert {name for foreign, _ in HONOURED_AS for name in foreign} == set(HONOURED)
    tables = [set(HONOURED), set(HARMLESS), set(REFUSED), set(DEFAULTS)]
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert {ours for ours, _ in HONOURED.values()} <= set(DEFAULTS)


@pytest.mark.parametrize(
    ("foreign", "given", "said"),
    [
        ({"torch_dtype": "float16"}, {"dtype": "bfloat16"}, "torch_dtype='float16' and dtype='bfloat16' contradict"),
        ({"device_map": "cuda"}, {"device": "cpu"}, "device_map='cuda' and device='cpu' contradict"),
        ({"max_seq_len": 5, "n_ctx": 6}, {}, "n_ctx=6 and max_seq_len=5 contradict"),
        (
            {"device_map": {"model.layers.0": 0, "lm_head": "cpu"}},
            {},
            r"'device_map': modules are not placed .* max_memory=",
        ),
        ({"prefetching": False}, {"prefetch_batches": 2}, "prefetching=False and prefetch_batches=2 contradict"),
    ],
)
def test_contradictions_are_told(foreign: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        adopt(foreign, given, DEFAULTS)


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit", "prefetching"])
@pytest.mark.parametrize("text", ["no", "False", 2, 0.5], ids=str)
def test_a_switch_is_true_or_false(name: str, text: object) -> None:
    with pytest.raises(ArgumentError, match=f"{name}={text!r}: use True or False"):
        adopt({name: text}, {}, DEFAULTS)


def test_two_switches_that_contradict_are_told_by_their_own_names() -> None:
    with pytest.raises(ArgumentError, match="load_in_8bit=True and load_in_4bit=True contradict each other"):
        adopt({"load_in_4bit": True, "load_in_8bit": True}, {}, DEFAULTS)


def test_saying_the_same_twice_is_no_contradiction() -> None:
    assert adopt({"torch_dtype": "float16"}, {"dtype": "float16"}, DEFAULTS) == {"dtype": "float16"}
    assert adopt({"device_map": "auto"}, {"device": "cpu"}, DEFAULTS) == {"device": "cpu"}


def test_what_changes_nothing_is_let_pass_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    given = {"max_context": 5}
    assert adopt(dict.fromkeys(HARMLESS, True), given, DEFAULTS) == given
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for name, why in HARMLESS.items():
        assert f"{name} ({why})" in record.getMessage()


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_is_refused_with_what_takes_its_place(name: str, caplog: pytest.LogCaptureFixture) -> None:
    value = False if name == "use_cache" else "4bit"
    with pytest.raises(ArgumentError) as caught:
        adopt({name: value}, {}, DEFAULTS)
    assert str(caught.value) == f"there is no argument {name!r}: {REFUSED[name]}"
    assert not caplog.records


@pytest.mark.parametrize("name", REFUSED)
def test_what_asks_for_nothing_is_no_error(name: str) -> None:
    assert adopt({name: None}, {}, DEFAULTS) == {}
    assert name == "config" or adopt({name: name == "use_cache"}, {}, DEFAULTS) == {}


@pytest.mark.parametrize("name", ["quantization", "bnb_config", "compress_weight", "quantization_config"])
def test_who_wants_to_quantise_is_told_what_there_is(name: str, tiny: WriteTiny) -> None:
    with pytest.raises(ArgumentError, match=f"{name}.*compression=.*quantised already .bitsandbytes, GPTQ.*GGUF"):
        AutoModel.from_pretrained(tiny("llama", torch.float32), **{name: {"bits": 4}})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("max_memmory", "max_memory"),
        ("prefetch", "prefetch_batches"),
        ("Dtype", "dtype"),
        ("max_contxt", "max_context"),
    ],
)
def test_unknown_arguments_are_asked_what_they_meant(typed: str, meant: str) -> None:
    with pytest.raises(ArgumentError, match=rf"{typed!r}: did you mean {meant!r}\?"):
        adopt({typed: 1}, {}, DEFAULTS)


@pytest.mark.parametrize("call", [AutoModel.plan, airstream.verify, lambda m, **k: airstream.repack(m, "out", **k)])
def test_every_function_tells_an_unknown_argument_alike(call: Any, tiny: WriteTiny) -> None:
    with pytest.raises(ArgumentError, match=r"^there is no argument 'revison': did you mean 'revision'"):
        call(tiny("llama", torch.float32), revison="main")


def test_an_argument_like_no_other_is_told_what_there_is() -> None:
    with pytest.raises(ArgumentError, match="'zzz': the arguments are dtype, device"):
        adopt({"zzz": 1}, {}, DEFAULTS)


def test_a_script_for_accelerate_runs_unchanged(
    tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny("llama", torch.float32)
    with AutoModel.from_pretrained(folder, device="cpu") as ours:
        expected = ours(IDS).logits
    with AutoModel.from_pretrained(
        folder, torch_dtype=torch.float32, device_map="cpu", low_cpu_mem_usage=True, offload_folder="never",
        use_safetensors=True, max_memory={"cpu": "1GiB"}, load_in_4bit=False, quantization_config=None,
    ) as model:  # fmt: skip
        assert torch.equal(model(IDS).logits, expected)
    assert not Path("never").exists()


def test_a_plan_takes_them_too(tiny: WriteTiny) -> None:
    plan = AutoModel.plan(tiny("llama", torch.float32), torch_dtype="fp16", device_map="cpu", n_ctx=24)
    assert plan.max_context == 24
    table = plan_table([tiny("llama", torch.float32)], ["T4"], torch_dtype="bf16", machine=Machine(ram="8GiB"))
    assert table.rows[0].precision == "bf16"
    with pytest.raises(ArgumentError, match="'promt_tokens': did you mean 'prompt_tokens'"):
        AutoModel.plan(tiny("llama", torch.float32), promt_tokens=5)


# ----------------------------------------------------------------------------------------------- subfolder and variant


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def halved(folder: Path, to: Path, name: str) -> None:
    """The checkpoint in `folder`, its weights halved, as the file `name` in the folder `to`."""
    to.mkdir(exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file({key: value / 2 for key, value in weights.items()}, to / name, metadata={"format": "pt"})
    if not (to / "config.json").exists():
        (to / "config.json").write_bytes((folder / "config.json").read_bytes())


def test_a_variant_is_other_weights_of_the_same_model(tiny: WriteTiny, tmp_path: Path) -> None:
    folder = copied(tiny("llama", torch.float32), tmp_path)
    halved(folder, folder, "model.fp16.safetensors")
    with (
        AutoModel.from_pretrained(folder, device="cpu") as one,
        AutoModel.from_pretrained(folder, device="cpu", variant="fp16") as other,
    ):
        assert torch.equal(one.model.norm.weight / 2, other.model.norm.weight)
        assert not torch.equal(one(IDS).logits, other(IDS).logits)
    with pytest.raises(CheckpointNotFoundError, match=r"variant='bf16': expected model\.bf16\.safetensors"):
        AutoModel.from_pretrained(folder, variant="bf16")


def test_a_subfolder_has_a_model_of_its_own(tiny: WriteTiny, tmp_path: Path) -> None:
    folder = copied(tiny("llama", torch.float32), tmp_path)
    halved(folder, folder / "half", "model.safetensors")
    with (
        AutoModel.from_pretrained(folder, device="cpu") as one,
        AutoModel.from_pretrained(folder, device="cpu", subfolder="half") as other,
    ):
        assert torch.equal(one.model.norm.weight / 2, other.model.norm.weight)
    with pytest.raises(CheckpointNotFoundError, match="has no folder 'quarter', which subfolder= names"):
        AutoModel.from_pretrained(folder, subfolder="quarter")


# ------------------------------------------------------------------------------------------- attention that is not here


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "some/kernel", "paged|flash_attention_2"])
def test_attention_without_its_package_is_one_error_with_a_remedy(
    name: str, tiny: WriteTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers says where the package is missing, also where it is not."""

    def build_on_meta(*_: Any) -> None:
        raise ImportError("there is no package for it.")

    monkeypatch.setattr("airstream.loading.build.build_on_meta", build_on_meta)
    with pytest.raises(UnsupportedError) as caught:
        AutoModel.from_pretrained(tiny("llama", torch.float32), attn_implementation=name)
    assert str(caught.value) == (
        f"attn_implementation={name!r} needs a package that is not installed here: there is no package for it. "
        'Install it, or leave the argument out: torch brings "sdpa"'
    )


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_flash_attention_is_not_here(tiny: WriteTiny) -> None:
    with pytest.raises(UnsupportedError, match=r"'flash_attention_2' needs a package .*sdpa"):
        AutoModel.plan(tiny("llama", torch.float32), attn_implementation="flash_attention_2")


def test_attention_that_nobody_knows_is_an_argument_error(tiny: WriteTiny) -> None:
    with pytest.raises(ArgumentError, match=r"^attn_implementation='nonsense': .*sdpa"):
        AutoModel.plan(tiny("llama", torch.float32), attn_implementation="nonsense")
    with pytest.raises(ArgumentError) as caught:
        AutoModel.plan(tiny("llama", torch.float32), attn_implementation="flash")
    assert '"' not in str(caught.value)
    assert "eager, flash_attention_2, " in str(caught.value)
