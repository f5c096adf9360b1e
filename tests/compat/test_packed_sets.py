"""Tensors of a packed weight that are missing, empty or too short are named before a pass, and by `verify`."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from airstream import CheckpointError, verify
from tests.conftest import stream
from tests.stand_ins.comparing import logits, prompts
from tests.stand_ins.quantized_models import (
    write_bitsandbytes,
    write_compressed,
    write_fp8,
    write_integers,
    write_torchao,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the packages of formats
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STATE = "weight.quant_state.bitsandbytes__nf4"
STEM = "model.layers.1.self_attn.k_proj."
WRITERS: Mapping[str, tuple[str | None, Callable[[Path], None]]] = {
    "torchao": ("torchao", lambda folder: write_torchao(folder, "Int8WeightOnlyConfig")),
    "fp8": (None, lambda folder: write_fp8("llama", folder)),
    "nf4": ("bitsandbytes", lambda folder: write_bitsandbytes("llama", folder, "nf4")),
    "nf4-double": ("bitsandbytes", lambda folder: write_bitsandbytes("llama", folder, "nf4-double")),
    "int8": ("bitsandbytes", lambda folder: write_bitsandbytes("llama", folder, "int8")),
    "int4": ("compressed_tensors", lambda folder: write_compressed(folder, 4)),
    "gptq": (None, lambda folder: write_integers(folder, "gptq 4-bit")),
}
"""By format: the package that it takes, and what writes a checkpoint."""

Change = Callable[[torch.Tensor], torch.Tensor] | None
CHANGES: Mapping[str, Change] = {
    "missing": None,
    "empty": lambda it: it.new_empty(0),
    "without rows": lambda it: it.new_empty(0, it.shape[-1]),
    "without columns": lambda it: it.new_empty(it.shape[0], 0),
    "half": lambda it: it[: len(it) // 2].contiguous(),
    "wider": lambda it: it.double(),
    "one": lambda it: it.flatten()[0].clone(),
    "twice": lambda it: torch.cat([it, it]),
    "in half precision": torch.Tensor.half,
    "as integers": torch.Tensor.long,
    "as floats": torch.Tensor.float,
    "of blocks of 128": lambda it: it.new_tensor(list(bytes(it).replace(b'"blocksize": 64', b'"blocksize": 128'))),
    "of no blocks": lambda it: it.new_tensor(list(bytes(it).replace(b'"blocksize": 64', b'"blocksize": {}'))),
    "a list": lambda it: it.new_tensor(list(b"[]")),
}
CASES = [
    *(("torchao", end, "missing") for end in ("_weight_qdata", "_weight_scale", "_weight_zero_point")),
    *(("torchao", "_weight_scale", what) for what in ("empty", "without rows", "without columns", "half")),
    ("fp8", "weight", "missing"),
    *(("int4", end, "missing") for end in ("weight_packed", "weight_scale", "weight_shape")),
    *(("fp8", "weight_scale_inv", what) for what in ("missing", "empty", "without rows", "without columns")),
    *(("nf4", end, "missing") for end in ("weight", "weight.absmax", "weight.quant_map")),
    *(("nf4", "weight", what) for what in ("empty", "without rows", "half", "wider")),
    *(("nf4", "weight.absmax", what) for what in ("empty", "one")),
    ("nf4-double", "weight.nested_absmax", "missing"),
    ("nf4-double", "weight.nested_absmax", "empty"),
    ("nf4-double", "weight.nested_quant_map", "missing"),
    ("nf4-double", "weight.absmax", "wider"),
    *(("nf4", STATE, what) for what in ("empty", "half", "twice", "in half precision", "as floats", "a list")),
    ("nf4", STATE, "of no blocks"),
    *(("nf4", "weight.absmax", what) for what in ("half", "twice")),
    *(("nf4-double", end, "in half precision") for end in ("weight.nested_absmax", "weight.nested_quant_map")),
    *(("int4", "weight_packed", what) for what in ("wider", "as floats", "as integers", "in half precision")),
    *(("int4", "weight_shape", what) for what in ("empty", "half", "twice", "one")),
    *(("int4", "weight_scale", what) for what in ("as integers", "half", "twice")),
    *(("int8", "SCB", what) for what in ("missing", "empty", "half", "wider")),
    ("int8", "weight", "missing"),
    *(("gptq", "g_idx", what) for what in ("empty", "one", "half")),
]


@functools.cache
def _written(root: Path, name: str) -> Path:
    WRITERS[name][1](root / name)
    return root / name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sets")

    def folder_of(name: str) -> Path:
        if (package := WRITERS[name][0]) is not None:
            pytest.importorskip(package)
        return _written(root, name)

    return folder_of


def spoiled(folder: Path, copy: Path, key: str, change: Change) -> None:
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("dense"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key])
    save_file(tensors, copy / "model.safetensors", metadata=metadata)


@pytest.mark.parametrize(("name", "end", "what"), CASES)
def test_it_is_named_before_a_pass(
    written: Callable[[str], Path], tmp_path: Path, name: str, end: str, what: str
) -> None:
    spoiled(written(name), tmp_path / "other", STEM + end, CHANGES[what])
    said = rf"other/model\.safetensors: .*'{re.escape(STEM + end)}'"
    for kernels in ("exact", "fast"):
        with pytest.raises(CheckpointError, match=said) as raised:
            stream(tmp_path / "other", kernels=kernels)
        assert "Error:" not in str(raised.value), "no other package's words"
    assert any(re.search(said, fault) for fault in verify(tmp_path / "other", progress=False).faults)


def test_scales_are_as_many_as_a_weight_says(written: Callable[[str], Path], tmp_path: Path) -> None:
    spoiled(written("nf4"), tmp_path / "other", STEM + STATE, CHANGES["of blocks of 128"])
    with pytest.raises(CheckpointError, match=rf"'{re.escape(STEM)}weight.absmax'.* says blocksize=128"):
        stream(tmp_path / "other")


@pytest.mark.parametrize("name", WRITERS)
def test_a_sound_one_is_not_refused(written: Callable[[str], Path], name: str) -> None:
    with stream(written(name)) as model:
        assert logits(model, prompts(1, 2)).isfinite().all()
    assert not verify(written(name), progress=False).faults


@pytest.mark.parametrize("block_size", [-1, [1, -1], [1, "64"], {}, "64"], ids=str)
def test_a_weight_of_torchao_says_the_sizes_of_its_groups(
    written: Callable[[str], Path], tmp_path: Path, block_size: object
) -> None:
    """Else torchao would fail in the first pass, in words of its own."""
    spoiled(written("torchao"), tmp_path / "other", STEM + "_weight_scale", lambda it: it)
    file, weight = tmp_path / "other" / "model.safetensors", f"{STEM}weight"
    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    said = json.loads(metadata[weight])
    said["_data"]["block_size"] = block_size
    save_file(tensors, file, metadata=metadata | {weight: json.dumps(said)})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: block_size of '{re.escape(weight)}'"):
        stream(tmp_path / "other")
