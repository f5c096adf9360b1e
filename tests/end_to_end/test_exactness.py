"""Streamed results are transformers' results, to the bit: for every architecture, dtype, device, and way to stream."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter

from airstream import AutoModel
from airstream.model.row_table import RowTable
from tests.conftest import Resident, WriteTiny, on_accelerator, simulated_accelerator, smallest_budget, stream
from tests.stand_ins.comparing import BF16, FP16, FP32, assert_equal, greedy, logits, prompts
from tests.stand_ins.sim import SimDevice
from tests.stand_ins.tiny_models import LLAMA, TINY, TinyModel, write_model

ALIGNMENT = 64
"""Bytes; kernels look at where weights start modulo this, and may sum in another order."""


# ------------------------------------------------------------------------------------------------ every architecture


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_every_architecture(tiny: WriteTiny, resident: Resident, name: str, dtype: torch.dtype) -> None:
    with stream(tiny(name, dtype)) as model:
        assert model.dtype == dtype
        assert_equal(model, resident(name, dtype, dtype))


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_on_an_accelerator(tiny: WriteTiny, resident: Resident, sim: SimDevice, name: str) -> None:
    with stream(tiny(name, FP32), "sim:0") as model:
        assert_equal(model, on_accelerator(resident(name, FP32, FP32)))
        assert sim.h2d_bytes >= model.plan.streamed_bytes
    assert sim.races == []


@pytest.mark.parametrize(
    ("name", "stored", "dtype"),
    [
        ("llama-sharded", BF16, FP32),
        ("llama-tied", BF16, FP16),
        ("gpt2", BF16, FP32),
        ("qwen3_moe", FP32, BF16),
        ("mixtral", BF16, FP32),
        ("deepseek_v3", BF16, FP16),  # keeps a bias of its routers in float32
        ("deepseek_v3", FP32, BF16),
        ("gpt_oss", BF16, FP16),  # keeps its norms in float32
        ("gpt_oss", FP16, BF16),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "sim:0"])
def test_casts(
    tiny: WriteTiny,
    resident: Resident,
    sim: SimDevice,
    name: str,
    stored: torch.dtype,
    dtype: torch.dtype,
    device: str,
) -> None:
    reference = resident(name, stored, dtype)
    with stream(tiny(name, stored), device, dtype=dtype) as model:
        assert_equal(model, reference if device == "cpu" else on_accelerator(reference))


FOREIGN_TYPES = ("int32", "int8", "uint8", "uint16", "int64", "bool", "float64", "float8_e4m3fn", "complex64")


@pytest.mark.parametrize("stored", FOREIGN_TYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_numbers_of_any_type_are_cast_as_transformers_casts_them(tmp_path: Path, name: str, stored: str) -> None:
    """A weight that is a matrix of integers in the file is one of whole numbers, for transformers, too."""
    write_model(TINY[name], tmp_path, FP32)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in {re.sub(r"\d+", "#", key): key for key in tensors}.values():  # one of each kind
        whole = tensors[key].mul(8).round()
        tensors[key] = (whole.abs() if stored.startswith("uint") else whole).to(getattr(torch, stored))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=FP32).eval().requires_grad_(False)
    with stream(tmp_path, dtype=FP32) as model:
        assert torch.equal(logits(model, prompts(1, 9)), logits(reference, prompts(1, 9)))


@pytest.mark.parametrize(("stored", "dtype"), [(BF16, BF16), (FP32, FP32), (FP32, FP16)])
@pytest.mark.parametrize("name", TINY)
def test_weights_in_place_are_the_resident_ones(
    tiny: WriteTiny, resident: Resident, name: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """At the moment a module runs: values, dtypes (some stay float32), and where they start as far as kernels care."""
    reference = dict(resident(name, stored, dtype).named_modules())
    seen: dict[str, dict[str, tuple[torch.Tensor, int]]] = {}

    def look(module: nn.Module, path: str) -> None:
        seen[path] = {key: (tensor.clone(), tensor.data_ptr() % ALIGNMENT) for key, tensor in tensors_of(module)}

    with stream(tiny(name, stored), dtype=dtype) as model:
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, _, path=path: look(module, path))
        logits(model, prompts(1, 4))
    assert sum(map(len, seen.values())) > 20
    misplaced = {}
    for path, tensors in seen.items():
        for key, (tensor, place) in tensors.items():
            expected = dict(tensors_of(reference[path]))[key]
            assert tensor.dtype == expected.dtype, f"{path}.{key}"
            assert torch.equal(tensor, expected), f"{path}.{key}"
            if place != expected.data_ptr() % ALIGNMENT:
                misplaced[f"{path}.{key}"] = (place, expected.data_ptr() % ALIGNMENT)
    assert misplaced == {}


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `module` itself owns, but for tables that are left on disk."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if not isinstance(tensor, RowTable):
            yield name, tensor


@pytest.mark.parametrize("name", TINY)
def test_outputs_tell_something(resident: Resident, name: str) -> None:
    """Of the tiny models: equal results would mean nothing if all results were."""
    outputs = logits(resident(name, BF16, BF16), prompts(1, 24))[0]
    assert outputs.isfinite().all()
    assert outputs.float().std() > 0.3
    assert len(outputs.argmax(-1).unique()) > 3


def test_checkpoints_have_what_makes_them_hard(tiny: WriteTiny) -> None:
    assert len(list(tiny("llama-sharded", BF16).glob("*.safetensors"))) >= 3
    assert (tiny("llama-sharded", BF16) / "model.safetensors.index.json").is_file()
    assert "lm_head.weight" not in header(tiny("llama-tied", BF16) / "model.safetensors")
    for name in ("qwen3_moe", "mixtral", "deepseek_v3"):  # experts that transformers merges when it loads them
        assert any(".experts.3." in key for key in header(tiny(name, BF16) / "model.safetensors"))


def header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(size))


# ------------------------------------------------------------------------------------------------ every way to stream


STREAMED = {"llama-sharded": FP32, "qwen3_moe": BF16, "gemma3": BF16}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(STREAMED)),
    prefetch_batches=st.integers(0, 3),
    layers_per_batch=st.integers(1, 5),
    page_cache=st.booleans(),
    is_tight=st.booleans(),
    device=st.sampled_from(["cpu", "sim:0"]),
    batch_size=st.integers(1, 3),
    tokens=st.integers(2, 20),
)
def test_every_way_to_stream(
    tiny: WriteTiny,
    resident: Resident,
    name: str,
    prefetch_batches: int,
    layers_per_batch: int,
    page_cache: bool,
    is_tight: bool,
    device: str,
    batch_size: int,
    tokens: int,
) -> None:
    folder, dtype = tiny(name, STREAMED[name]), STREAMED[name]
    inputs = prompts(batch_size, tokens)
    options: dict[str, Any] = {
        "device": device,
        "prefetch_batches": prefetch_batches,
        "layers_per_batch": layers_per_batch,
        "page_cache": page_cache,
        "max_context": 32,
        "max_batch_size": batch_size,
    }
    reference = resident(name, dtype, dtype)
    with ExitStack() as stack:
        if device == "sim:0":
            stack.enter_context(simulated_accelerator())
            reference = on_accelerator(reference)
        if is_tight:
            options["max_memory"] = smallest_budget(folder, **options)
        model = stack.enter_context(stream(folder, **options))
        assert model.plan.prefetch_batches == prefetch_batches
        assert model.plan.direct_io is not page_cache
        assert torch.equal(logits(model, inputs), logits(reference, inputs))
        assert torch.equal(greedy(model, inputs), greedy(reference, inputs))


# ---------------------------------------------------------------------------------------- conversions that see values

CONVERTED = TinyModel("olmo", LLAMA | {"tie_word_embeddings": False})
"""An architecture whose checkpoints transformers takes as they are, until the fixture below says otherwise."""


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_model(CONVERTED, folder, BF16)
    return folder


@pytest.fixture(scope="module")
def converted_folder(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, to be transposed, joined and cut across their rows, in the layers and outside of them."""
    register_checkpoint_conversion_mapping(
        CONVERTED.model_type,
        [
            WeightConverter("mlp.down_transposed.weight", "mlp.down_proj.weight", [Transpose(0, 1)]),
            WeightConverter(["o_left.weight", "o_right.weight"], "o_proj.weight", [Concatenate(dim=1)]),
            WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=1)]),
            WeightConverter("embed_transposed.weight", "embed_tokens.weight", [Transpose(0, 1)]),
            WeightConverter("lm_head_transposed.weight", "lm_head.weight", [Transpose(0, 1)]),
        ],
        overwrite=True,
    )
    folder = tmp_path_factory.mktemp("converted")
    write_model(CONVERTED, folder, BF16)  # transformers converts back when it saves
    return folder


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("prefetch_batches", [0, 2, 3])
def test_conversions(
    converted_folder: Path, sim: SimDevice, dtype: torch.dtype, prefetch_batches: int, device: str
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(converted_folder, dtype=dtype)
    with stream(converted_folder, device, dtype=dtype, layers_per_batch=1, prefetch_batches=prefetch_batches) as model:
        assert_equal(model, reference if device == "cpu" else on_accelerator(reference))


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
def test_conversions_are_profiled(converted_folder: Path, sim: SimDevice, device: str) -> None:
    with stream(converted_folder, device) as model, model.profile() as profile:
        model(torch.arange(3, 12)[None].to(device))
    costs = profile.total
    assert 0 < costs.links["convert"].seconds <= costs.compute_seconds
    assert 0 < costs.links["convert"].nbytes <= costs.read_bytes


def test_conversions_are_needed_and_planned_for(plain_folder: Path, converted_folder: Path) -> None:
    plain, stored = load_file(plain_folder / "model.safetensors"), load_file(converted_folder / "model.safetensors")
    assert {"lm_head_transposed.weight", "model.layers.3.mlp.gate_up.weight"} <= stored.keys()
    loaded = AutoModelForCausalLM.from_pretrained(converted_folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.items())
    assert AutoModel.plan(converted_folder, device="cpu").tiers["cpu"].items["conversion"] > 0
