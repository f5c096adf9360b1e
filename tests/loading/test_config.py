"""Arguments are checked before anything is opened, and every complaint names the argument it is about."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import airstream
from airstream import AutoModel, auto
from airstream.cli.options import load_options
from airstream.cli.parser import build_parser
from airstream.cli.values import parse_memory
from airstream.errors import ArgumentError, CheckpointError
from airstream.loading.options import LoadOptions, MaxMemory, named_dtype, parse_max_memory, resolve_device
from airstream.reporting.units import GIB, MIB
from airstream.transfer.runtime import RUNTIMES
from tests.conftest import WriteTiny

CPU, ACCELERATOR = torch.device("cpu"), torch.device("cuda", 1)


def test_the_defaults_are_valid() -> None:
    options = LoadOptions()
    assert options.dtype == "auto"
    assert options.max_memory is None


GOOD: list[dict[str, Any]] = [
    {"dtype": "bfloat16"},
    {"dtype": "torch.float16"},
    {"dtype": torch.float32},
    {"max_context": 1},
    {"max_batch_size": 8},
    {"layers_per_batch": 3},
    {"prefetch_batches": 0},
    {"page_cache": True},
    {"page_cache": False},
    {"dtype": "bf16"},
    {"subfolder": "text_encoder/inner"},
    {"variant": "fp16"},
]


@pytest.mark.parametrize("arguments", GOOD, ids=str)
def test_good_arguments(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    assert getattr(LoadOptions(**arguments), name) == value


COUNTS = ("max_batch_size", "max_context", "layers_per_batch")
STORED = [name for name in dir(torch) if name.startswith(("float8", "float4", "complex", "uint", "int4"))]
"""Types that nothing computes in."""

BAD: list[tuple[str, Any]] = [
    *((name, value) for name in COUNTS for value in (0, -1, 1.5, "2", True)),
    ("max_batch_size", None),
    ("layers_per_batch", None),
    ("layers_per_batch", "Auto"),
    ("prefetch_batches", -1),
    ("prefetch_batches", 0.5),
    ("prefetch_batches", False),
    ("prefetch_batches", None),
    ("page_cache", "yes"),
    ("page_cache", None),
    ("page_cache", 2),
    ("dtype", "int8"),
    ("dtype", "float17"),
    ("dtype", "nn"),
    ("dtype", ""),
    ("dtype", torch.int64),
    ("dtype", None),
    ("dtype", 16),
    ("dtype", "fp17"),
    ("dtype", "4bit"),
    *(("dtype", value) for name, value in vars(torch).items() if isinstance(value, torch.dtype) and name in STORED),
    *(("dtype", name) for name in STORED),
    *(("subfolder", value) for value in ("/etc", "..", "a/../../b", "a*", "a\\b", "a[b]", None, 5)),
    *(("variant", value) for value in ("", "../x", "fp16/x", "a.b", 16, "*")),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value))
def test_bad_arguments_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        LoadOptions(**{name: value})
    assert str(caught.value).startswith(f"{name}=")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("short", "dtype"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32), ("half", torch.float16)],
)
def test_short_names_of_dtypes(short: str, dtype: torch.dtype) -> None:
    assert named_dtype(short) is named_dtype(f"torch.{short}") is dtype


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_a_config_with_a_type_that_nothing_computes_in_is_told_what_to_name(
    stored: str, tiny: WriteTiny, tmp_path: Path
) -> None:
    for file in tiny("llama", torch.bfloat16).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": stored}))
    with pytest.raises(CheckpointError, match=rf"has dtype torch\.{stored}, which no model computes in"):
        AutoModel.plan(tmp_path, device="cpu")
    assert AutoModel.plan(tmp_path, device="cpu", dtype="float32").dtype == "float32"


def test_options_cannot_change() -> None:
    with pytest.raises(AttributeError):
        LoadOptions().max_context = 5  # type: ignore[misc]


MAX_MEMORY: list[tuple[MaxMemory, torch.device, dict[str, int]]] = [
    (None, CPU, {}),
    ("auto", CPU, {}),
    ("4GiB", CPU, {"cpu": 4 * GIB}),
    (4 * GIB, CPU, {"cpu": 4 * GIB}),
    ("4GiB", ACCELERATOR, {"1": 4 * GIB}),
    ({"cpu": "512MiB"}, CPU, {"cpu": 512 * MIB}),
    ({1: "4GiB", "cpu": 8 * GIB}, ACCELERATOR, {"1": 4 * GIB, "cpu": 8 * GIB}),
    ({"1": "4GiB"}, ACCELERATOR, {"1": 4 * GIB}),
    ({1: "auto", "cpu": "1GiB"}, ACCELERATOR, {"cpu": GIB}),
    ({"cuda:1": "4GiB"}, ACCELERATOR, {"1": 4 * GIB}),
    ("4G", CPU, {"cpu": 4 * GIB}),
    (4e9, CPU, {"cpu": 4_000_000_000}),
    ({"cpu": "4e9"}, CPU, {"cpu": 4_000_000_000}),
    (MIB, CPU, {"cpu": MIB}),
]


@pytest.mark.parametrize(("max_memory", "device", "budgets"), MAX_MEMORY, ids=str)
def test_parse_max_memory(max_memory: MaxMemory, device: torch.device, budgets: dict[str, int]) -> None:
    assert parse_max_memory(max_memory, device) == budgets


@pytest.mark.parametrize(
    ("max_memory", "device", "said"),
    [
        ("lots", CPU, "max_memory='lots'"),
        (0, CPU, "max_memory=0"),
        (True, CPU, "max_memory=True"),
        (1.5, CPU, "max_memory=1.5"),
        ({"cpu": "lots"}, CPU, "max_memory['cpu']='lots'"),
        ({1: -5}, ACCELERATOR, "max_memory[1]=-5"),
        ({0: "4GiB"}, CPU, "max_memory names 0, but the model runs on cpu"),
        ({0: "4GiB"}, ACCELERATOR, "max_memory names 0, but the model runs on cuda:1"),
        ({"disk": "4GiB"}, CPU, "max_memory names 'disk'"),
        ({"cuda:0": "4GiB"}, ACCELERATOR, "max_memory names 'cuda:0'"),
        ({None: "4GiB"}, CPU, "max_memory names None"),
        ({}, CPU, 'max_memory={} names no memory: write max_memory={"cpu": "4GiB"}, or leave it out'),
        (
            {},
            ACCELERATOR,
            'max_memory={} names no memory: write max_memory={1: "4GiB", "cpu": "8GiB"}, or leave it out',
        ),
    ],
    ids=str,
)
def test_bad_max_memory_is_refused_by_name(max_memory: Any, device: torch.device, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_max_memory(max_memory, device)
    assert str(caught.value).startswith(said)


def test_a_wrong_key_of_max_memory_is_told_the_right_ones() -> None:
    with pytest.raises(ArgumentError, match=r'write max_memory={1: "4GiB", "cpu": "8GiB"}, or'):
        parse_max_memory({0: "4GiB"}, ACCELERATOR)


@pytest.mark.parametrize(
    ("max_memory", "guess"),
    [
        ("4096", '4.0 KiB, in which no model runs; did you mean "4096MiB"?'),
        (4096, '4.0 KiB, in which no model runs; did you mean "4096MiB"?'),
        ("8", '8 B, in which no model runs; did you mean "8GiB"?'),
        ({"cpu": 24}, '24 B, in which no model runs; did you mean "24GiB"?'),
        ({"cpu": "1023 KiB"}, "1023 KiB, in which no model runs"),
    ],
)
def test_a_forgotten_unit_is_guessed(max_memory: Any, guess: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_max_memory(max_memory, CPU)
    assert str(caught.value).endswith(f"is {guess}")


@pytest.mark.parametrize(
    ("device", "resolved"),
    [
        ("cpu", CPU),
        ("CPU", CPU),
        ("CUDA:1", ACCELERATOR),
        (CPU, CPU),
        (torch.device("cpu", 0), CPU),
        ("cuda:1", ACCELERATOR),
        ("cuda", torch.device("cuda", 0)),
        (torch.device("xpu"), torch.device("xpu", 0)),
    ],
    ids=str,
)
def test_resolve_device(device: str | torch.device, resolved: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[torch.device]()

    def is_present(found: torch.device) -> bool:
        asked.append(found)
        return True

    monkeypatch.setattr("airstream.loading.options.is_present", is_present)
    assert resolve_device(device) == resolved
    assert resolve_device(device).index == resolved.index
    assert set(asked) == {resolved} - {CPU}


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu:0", ACCELERATOR], ids=str)
def test_a_device_that_is_not_there_is_refused_with_what_is(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airstream.loading.options.is_present", lambda _: False)
    monkeypatch.setattr("airstream.loading.options.describe_devices", lambda: "a pocket calculator")
    with pytest.raises(ArgumentError) as caught:
        resolve_device(device)
    assert str(caught.value) == f"device={device!r} is not there: torch finds a pocket calculator"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^device='cuda' is not there: torch finds .*CPU"):
        resolve_device("cuda")


def test_a_device_with_a_runtime_of_its_own_is_not_looked_for_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airstream.loading.options.is_present", lambda _: False)
    with pytest.raises(ArgumentError):
        resolve_device("privateuseone")
    monkeypatch.setitem(RUNTIMES, torch.device("privateuseone").type, lambda _: pytest.fail("it was started"))
    assert resolve_device("privateuseone") == torch.device("privateuseone", 0)


@pytest.mark.parametrize("device", [None, "auto"])
def test_without_an_accelerator_the_cpu_computes(device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **_: None
    )  # other tests may have simulated one
    assert resolve_device(device) == torch.device("cpu")


@pytest.mark.parametrize("device", ["warp", "cuda:x", "", "meta", 1.5, b"cuda"], ids=repr)
def test_bad_devices_are_refused_by_name(device: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^device="):
        resolve_device(device)


@pytest.mark.parametrize(
    ("device", "meant"), [("gpu", "cuda"), ("GPU:1", "cuda:1"), ("nvidia", "cuda"), ("metal", "mps")]
)
def test_a_device_by_another_name_is_told_its_own(device: str, meant: str) -> None:
    with pytest.raises(ArgumentError, match=rf'^device={device!r} .* write device="{meant}"$'):
        resolve_device(device)


def test_an_accelerators_budget_where_the_cpu_computes() -> None:
    with pytest.raises(ArgumentError, match=r'max_memory=\{"cpu": \'4GiB\'\} .*device="cuda"'):
        parse_max_memory({0: "4GiB"}, CPU)


@pytest.mark.parametrize("name", ["trust_remote_code", "local_files_only", "profiling_mode"])
@pytest.mark.parametrize("value", ["no", "yes", 3])
def test_what_is_true_or_false_is_no_text(name: str, value: object) -> None:
    """`trust_remote_code="no"` would run what the checkpoint brings."""
    with pytest.raises(ArgumentError, match=rf"^{name}={value!r}: use True or False"):
        LoadOptions(**{name: value})


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("4GiB", "max_memory='4GiB'"),
        (4 << 30, "max_memory=4294967296"),
        ({"cpu": "4GiB"}, "max_memory={'cpu': '4GiB'}"),
        ("bfloat16", "dtype='bfloat16'"),
        (torch.float16, "dtype=torch.float16"),
        ("cuda:1", "device='cuda:1'"),
        (torch.device("cpu"), "device='cpu'"),
        (object, 'max_memory="4GiB"'),
    ],
    ids=str,
)
def test_what_has_no_name_is_told_its_name(value: object, meant: str) -> None:
    for call in (airstream.AutoModel.from_pretrained, airstream.AutoModel.plan):
        with pytest.raises(ArgumentError, match=f"has no name: .* every argument is named, as in {meant}$"):
            call("some/model", value)


# ------------------------------------------------------------------------------------- one list of options, three times

SET: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "device": "cpu",
    "max_memory": "4GiB",
    "max_context": 7,
    "max_batch_size": 3,
    "layers_per_batch": 2,
    "prefetch_batches": 5,
    "page_cache": True,
    "model_class": "AutoModel",
    "compression": "lossless",
    "kernels": "fast",
    "attn_implementation": "eager",
    "gguf_file": "a.gguf",
    "subfolder": "part",
    "variant": "fp16",
    "revision": "v2",
    "token": "hf_secret",
    "cache_dir": "elsewhere",
    "local_files_only": True,
    "trust_remote_code": True,
    "profiling_mode": True,
    "progress": False,
}
"""A value for every option that is not its default."""

NOT_TYPED = {"model_class", "profiling_mode", "progress"}
"""Options that the command line chooses by itself."""


def test_from_pretrained_names_every_option_and_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(auto, "load_model", lambda name, options, foreign: made.append(vars(options)))
    defaults = {field.name: field.default for field in fields(LoadOptions)}
    signature = inspect.signature(AutoModel.from_pretrained).parameters.values()
    named = {each.name: each.default for each in signature if each.kind is inspect.Parameter.KEYWORD_ONLY}
    assert named == defaults
    assert set(SET) == set(defaults)
    assert all(SET[name] != value for name, value in defaults.items())
    AutoModel.from_pretrained("model", **SET)
    assert made == [dict(SET)]


def test_the_command_line_passes_every_option_on() -> None:
    words: list[str] = []
    for name, value in SET.items():
        if name not in NOT_TYPED:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    arguments = build_parser("0.1.0").parse_args(["generate", "model", "prompt", *words])
    expected = {name: value for name, value in SET.items() if name not in NOT_TYPED}
    assert load_options(arguments) == expected | {"max_memory": parse_memory(["4GiB"])}
