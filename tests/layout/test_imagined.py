"""Imagined checkpoints are those that transformers writes, to the byte, and published models have their sizes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, DeepseekV3Config, FalconConfig, LlamaConfig, OPTConfig, PreTrainedConfig

from airstream.checkpoint.names import SINGLE_FILE
from airstream.checkpoint.safetensors import open_safetensors
from airstream.checkpoint.stored import ITEM_BYTES, CheckpointIndex
from airstream.compat.building import build_on_meta
from airstream.compat.classes import choose_class
from airstream.compat.traits import measure_cache
from airstream.footprint.of_config import footprint
from airstream.layout.byte_plan import read_specs
from airstream.layout.imagined import IMAGINED_FOLDER, WRITING_ORDER, imagine
from airstream.layout.parts import Kind, Parts, divide
from airstream.layout.pieces import TORCH_DTYPES
from airstream.layout.slab import pack
from airstream.loading.build import Built
from airstream.loading.gather import gather_facts
from airstream.reporting.units import GIB
from airstream.transfer.accelerator import AcceleratorBackend
from airstream.transfer.cpu import CpuBackend
from airstream.transfer.packing import Packing
from tests.conftest import WriteTiny
from tests.stand_ins.tiny_models import TINY

GB = 10**9
EVERY_MODEL = pytest.mark.parametrize("name", [name for name, entry in TINY.items() if entry.shard_bytes == 1 << 30])


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """A model without weights."""
    return build_on_meta(*choose_class(config, Path(), trust_remote_code=False), dtype, None)


def build_tiny(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    return build(AutoConfig.for_model(TINY[name].model_type, **TINY[name].fields), dtype)


def parts_of(model: torch.nn.Module, index: CheckpointIndex) -> Parts:
    return divide(model, read_specs(model, index, model.dtype))


def unit_bytes(parts: Parts, packing: Packing) -> dict[str, int]:
    return {part.name: pack(part.specs, packing).nbytes for part in parts.of(Kind.LAYER)}


def billions(model: torch.nn.Module) -> float:
    """Parameters stored."""
    return sum(tensor.nbytes // ITEM_BYTES[tensor.dtype] for tensor in imagine(model).values()) / 1e9


# ----------------------------------------------------------------------------------------------- as transformers writes


@EVERY_MODEL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_is_the_checkpoint_that_transformers_writes(name: str, dtype: torch.dtype, tiny: WriteTiny) -> None:
    """Names, types, shapes, and where in the file every tensor lies."""
    folder = tiny(name, dtype)
    assert dict(imagine(build_tiny(name, dtype), folder=folder)) == dict(open_safetensors(folder))


@EVERY_MODEL
@pytest.mark.parametrize("packing", [CpuBackend.packing, AcceleratorBackend.packing], ids=["in place", "aligned"])
def test_units_are_as_large_as_those_of_the_written_checkpoint(name: str, packing: Packing, tiny: WriteTiny) -> None:
    folder, model = tiny(name, torch.bfloat16), build_tiny(name)
    imagined, written = parts_of(model, imagine(model)), parts_of(model, open_safetensors(folder))
    assert imagined.stacks == written.stacks
    assert [part.name for part in imagined.of(Kind.TABLE)] == [part.name for part in written.of(Kind.TABLE)]
    assert (imagined.head is None) == (written.head is None)
    assert unit_bytes(imagined, packing) == unit_bytes(written, packing)


def test_a_sharded_checkpoint_has_the_same_tensors_in_one_file(tiny: WriteTiny) -> None:
    imagined, written = (
        imagine(build_tiny("llama-sharded")),
        open_safetensors(tiny("llama-sharded", torch.bfloat16)),
    )
    assert len(written.files) > 1
    assert imagined.files == (IMAGINED_FOLDER / SINGLE_FILE,)
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in imagined.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in written.items()
    }


@EVERY_MODEL
def test_it_may_be_stored_in_another_dtype_than_the_model_computes_in(name: str, tiny: WriteTiny) -> None:
    folder = tiny(name, torch.float16)
    imagined, written = imagine(build_tiny(name, torch.float32), torch.float16, folder), open_safetensors(folder)
    kept = {
        key for key in written if written[key].dtype == "F32"
    }  # routers: a model in float32 does not tell them apart
    assert {key for key in written if imagined[key].dtype != written[key].dtype} == kept
    assert kept or dict(imagined) == dict(written)


def test_tensors_that_the_model_keeps_in_another_dtype_stay_in_it() -> None:
    model = build_tiny("llama")
    model.model.norm.to(torch.float32)
    imagined = imagine(model, torch.float16)
    assert {tensor.dtype for tensor in imagined.values()} == {"F16", "F32"}
    assert next(iter(imagined)) == "model.norm.weight", "what needs the largest alignment is written first"


def test_what_is_not_saved_is_not_imagined() -> None:
    model = build_tiny("llama")
    model._keys_to_ignore_on_save = {"model.norm.weight"}
    assert set(model.state_dict()) - set(imagine(model)) == {"model.norm.weight"}


def test_every_type_that_safetensors_stores_has_its_place() -> None:
    assert sorted(WRITING_ORDER) == sorted(TORCH_DTYPES)
    sizes = [ITEM_BYTES[name] for name in WRITING_ORDER]
    assert sizes == sorted(sizes, reverse=True)


def test_types_are_ordered_as_the_safetensors_library_orders_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: torch.zeros(8, dtype=dtype) for name, dtype in TORCH_DTYPES.items()}
    save_file(tensors, tmp_path / SINGLE_FILE)
    assert tuple(open_safetensors(tmp_path)) == WRITING_ORDER


def test_no_file_is_opened_and_none_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build_tiny("qwen3_moe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "open", None)
    monkeypatch.setattr("io.open", None)
    monkeypatch.setattr("builtins.open", None)
    parts_of(model, imagine(model))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ published sizes

LLAMA_PAPER = {
    # parameters in billions: dim, heads, layers (Touvron et al. 2023, Table 2), and the MLP's width of the release
    6.7: (4096, 32, 32, 11008),
    13.0: (5120, 40, 40, 13824),
    32.5: (6656, 52, 60, 17920),
    65.2: (8192, 64, 80, 22016),
}


def llama(dim: int, heads: int, layers: int, intermediate: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


@pytest.mark.parametrize(("parameters", "fp16_gb"), [(6.7, 13), (13.0, 26), (32.5, 65), (65.2, 130)])
def test_llama_has_the_sizes_of_its_paper(parameters: float, fp16_gb: int) -> None:
    model = build(llama(*LLAMA_PAPER[parameters]), torch.float16)
    assert billions(model) == pytest.approx(parameters, abs=0.1)
    assert imagine(model).nbytes == pytest.approx(fp16_gb * GB, rel=0.04)


def test_one_token_of_llama_7b_takes_half_a_mebibyte_of_kv_cache() -> None:
    model = build(llama(*LLAMA_PAPER[6.7]), torch.float16)
    need = footprint(model.config, 2, eager_attention=False, cache=measure_cache(model))
    assert need.kv_elements * need.item_bytes == 524_288


def falcon_180b() -> FalconConfig:
    return FalconConfig(
        vocab_size=65024,
        hidden_size=14848,
        num_hidden_layers=80,
        num_attention_heads=232,
        num_kv_heads=8,
        new_decoder_architecture=True,
        tie_word_embeddings=False,
    )


def test_falcon_180b_has_its_published_size() -> None:
    """179.5 billion parameters; "about 340 GB" in bfloat16 are GiB, 359 GB."""
    model = build(falcon_180b())
    assert model.config.ffn_hidden_size == 4 * 14848
    assert billions(model) == pytest.approx(179.5, abs=0.1)
    assert imagine(model).nbytes / GIB == pytest.approx(334.4, abs=0.1)


def test_five_layers_of_falcon_180b_fill_a_card_and_sixteen_cards_hold_it() -> None:
    """Five layers are 20.6 GiB, reported as "about 21 GB": a card of 24 GB holds no sixth. 80 layers, 16 cards."""
    model = build(falcon_180b())
    sizes = set(unit_bytes(parts_of(model, imagine(model)), AcceleratorBackend.packing).values())
    (layer,) = sizes
    assert 5 * layer / GIB == pytest.approx(20.6, abs=0.1)
    cards = -(-80 // (24 * GIB // layer))
    assert cards == 16


def test_opt_175b_and_its_kv_cache_have_the_sizes_of_the_flexgen_paper() -> None:
    """Layers of 325 GB, which are GiB (348 GB); 1.2 TB, likewise, for 512 sequences of 512 + 32 tokens."""
    config = OPTConfig(
        hidden_size=12288,
        word_embed_proj_dim=12288,
        ffn_dim=49152,
        num_hidden_layers=96,
        num_attention_heads=96,
        vocab_size=50272,
    )
    model = build(config, torch.float16)
    assert sum(unit_bytes(parts_of(model, imagine(model)), AcceleratorBackend.packing).values()) / GIB == pytest.approx(
        325, rel=0.005
    )
    need = footprint(config, 2, eager_attention=False)
    assert need.kv_elements * need.item_bytes * 512 * (512 + 32) / (1 << 40) == pytest.approx(1.2, abs=0.01)


def test_the_facts_of_a_model_need_only_its_config() -> None:
    model = build(falcon_180b())
    parts = parts_of(model, imagine(model))
    packing = AcceleratorBackend.packing
    built = Built(model, model.dtype, None, None, measure_cache(model), ())
    facts = gather_facts("falcon-180b", IMAGINED_FOLDER, built, parts, torch.device("meta"), packing, "auto")
    assert facts.checkpoint_bytes == imagine(model).nbytes
    assert [len(batch.units) for batch in facts.batchings[1]] == [1] * 80
    assert not facts.has_tokenizer


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (
            LlamaConfig(
                vocab_size=128256,
                hidden_size=16384,
                intermediate_size=53248,
                num_hidden_layers=126,
                num_attention_heads=128,
                num_key_value_heads=8,
            ),
            405,
        ),
        (DeepseekV3Config(), 671),
    ],
    ids=["Llama-3.1-405B", "DeepSeek-V3"],
)
def test_the_largest_models_are_imagined_too(config: PreTrainedConfig, parameters: int) -> None:
    assert billions(build(config)) == pytest.approx(parameters, rel=0.003)
