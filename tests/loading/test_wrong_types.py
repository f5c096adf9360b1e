"""Every argument of every public function, given what it is not meant for: an error of airstream's, or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from airstream import AirstreamError, ArgumentError, AutoModel, Machine, plan_table, plot_plan, repack, verify
from airstream.loading.options import LoadOptions
from airstream.profiling import plot, trace
from tests.conftest import WriteTiny

WRONG: tuple[Any, ...] = (
    object(), 7, 1.5, float("nan"), "RTX 3090", "a\0b", "x" * 5000, "\udc80", b"x", ["x"], ("a", "b"), {"gpu": "3090"},
    None, True, lambda: 1, torch.ones(2),
)  # fmt: skip

PICTURE: Any = SimpleNamespace(model="m", device="cpu", dtype="float32", passes=[], spans=[], sizes=[], started=0.0)

LOADING = [option.name for option in fields(LoadOptions)]
SOURCE = ["gguf_file", "subfolder", "variant", "revision", "token", "cache_dir", "local_files_only"]

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], list[str]]] = {
    "AutoModel.plan": (AutoModel.plan, {"device": "cpu"}, ["machine", "prompt_tokens", "n_ctx", *LOADING]),
    "plan_table": (plan_table, {"gpus": ["T4"]}, ["gpus", "machine", "prompt_tokens", "max_memory"]),
    "plot_plan": (plot_plan, {"device": "cpu"}, ["machine", "file"]),
    "repack": (repack, {"progress": False}, ["out", "layers", "shard_size", "progress", *SOURCE]),
    "verify": (verify, {"progress": False}, ["deep", "read", "progress", *SOURCE]),
    "Machine": (Machine, {}, ["gpu", "ram", "disk_gbps"]),
    "Profile.plot": (lambda file: plot.draw(PICTURE, file), {}, ["file"]),
    "Profile.save_trace": (lambda file: trace.save(PICTURE, file), {}, ["file"]),
}
"""The function, what is right besides, and the arguments to give something wrong."""

ALONE = ("Machine", "Profile.plot", "Profile.save_trace")
"""Those that name no model."""


class LetPassError(Exception):
    """What follows takes seconds, and is not looked at here."""


def let_pass(*_: object) -> None:
    raise LetPassError


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_type_is_an_error_of_airstreams(
    name: str, tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("airstream.capacity.map.survey", let_pass)
    monkeypatch.setattr("airstream.profiling.plot._draw_lanes", let_pass)
    function, right, arguments = CALLS[name]
    model = tiny("llama", torch.bfloat16)
    first = () if name in ALONE else ([model],) if name == "plan_table" else (model,)
    for argument in arguments:
        for number, value in enumerate(WRONG):
            if argument == "device" and value is None:  # the right value of whoever leaves the choice to torch
                continue
            out = {"out": f"{argument}-{number}"} if name == "repack" else {}
            try:
                function(*first, **{**right, **out, argument: value})
            except (AirstreamError, LetPassError):
                pass
            except Exception as error:
                pytest.fail(f"{name}({argument}={value!r}) raised {error!r}")


@pytest.mark.parametrize(
    ("machine", "meant"),
    [
        ("RTX 3090", "machine=Machine(gpu='RTX 3090')"),
        ({"gpu": "3090", "ram": "64GiB"}, "machine=Machine(gpu='3090', ram='64GiB')"),
        (None, 'machine=Machine(gpu="RTX 3090", ram="64GiB")'),
    ],
)
def test_what_is_no_machine_is_told_how_to_write_one(machine: Any, meant: str) -> None:
    for ask in (lambda: AutoModel.plan("m", machine=machine), lambda: plan_table(["m"], ["T4"], machine=machine)):
        with pytest.raises(ArgumentError) as refusal:
            ask()
        assert f"machine={machine!r} is not a Machine: write {meant}, or leave it out" == str(refusal.value)


@pytest.mark.parametrize("gpu", [3090, ["RTX 3090"], True])
def test_a_card_is_named_by_text(gpu: Any) -> None:
    with pytest.raises(ArgumentError) as refusal:
        Machine(gpu=gpu)
    assert f'gpu={gpu!r} is not the name of a card: use one such as "RTX 3090"' == str(refusal.value)


@pytest.mark.parametrize("models", [7, "m", b"m", [], None, torch.ones(2)])
def test_a_table_is_of_lists(models: Any) -> None:
    for lists in ((models, ["T4"]), (["m"], models)):
        with pytest.raises(ArgumentError, match="lists of models and of cards"):
            plan_table(*lists)
