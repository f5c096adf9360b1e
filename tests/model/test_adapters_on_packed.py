"""Adapters beside a model whose weights are packed compute what they compute with transformers and PEFT, to the bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import airstream
from airstream import AutoModel, UnsupportedError
from tests.conftest import on_accelerator, stream
from tests.model.test_adapters import assert_equal, least_memory_with
from tests.stand_ins.comparing import logits, prompts
from tests.stand_ins.quantized_models import write_bitsandbytes
from tests.stand_ins.sim import SimDevice
from tests.stand_ins.tiny_models import TINY, TinyModel, tiny_tokenizer, write_model

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what transformers and the formats' packages warn of is theirs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BF16 = torch.bfloat16
IDS = prompts(1, 12)
Folder = Callable[[str], Path]
Adapter = Callable[..., Path]

WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3}
"""Wide enough for every codec."""

PACKAGES = {
    "nf4": "bitsandbytes",
    "bitsandbytes nf4-double": "bitsandbytes",
    "bitsandbytes int8": "bitsandbytes",
    "int8": "torchao",
    "int4": "compressed_tensors",
    "fp8": "accelerate",
}
"""Codecs of `repack`, and formats of `BITSANDBYTES` that transformers saves; and the package that each takes."""

OBJECTS = [name for name, package in PACKAGES.items() if package in ("bitsandbytes", "torchao")]
OF_BITSANDBYTES = [name for name, package in PACKAGES.items() if package == "bitsandbytes"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder_of(format)`: a llama in that format; "dense" is what the codecs' are made of."""
    root = tmp_path_factory.mktemp("packed")

    @functools.cache
    def written(name: str) -> Path:
        folder = root / name
        if name == "dense":
            write_model(TinyModel(TINY["llama"].model_type, TINY["llama"].fields | WIDE), folder, BF16)
            tiny_tokenizer().save_pretrained(folder)
            return folder
        pytest.importorskip(PACKAGES[name])
        if name.startswith("bitsandbytes"):
            write_bitsandbytes("llama", folder, name.removeprefix("bitsandbytes "))
        else:
            airstream.repack(written("dense"), folder, codec=name)
        return folder

    return written


@pytest.fixture(scope="module")
def adapter(folder_of: Folder, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """`adapter(format, seed, **config)`: the folder of an adapter with random weights, made for the dense model."""

    def write(name: str, seed: int = 1, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        dense = folder_of(name) / "dense" if name.startswith("bitsandbytes") else folder_of("dense")
        torch.manual_seed(seed)
        settings = {"target_modules": "all-linear"} | config
        lora = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(dense), lora).save_pretrained(folder)
        return folder

    return write


def fresh(folder: Path) -> Any:
    """The resident model, as transformers loads it; of weights that PEFT cannot be beside, made dense."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    options = {}
    if settings["quant_method"] == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)


def loaded(model: Any, adapter: Path, **options: Any) -> Any:
    """`model` with the adapter, by its own method, or, with options, by PEFT."""
    if options:
        return peft.PeftModel.from_pretrained(model, adapter, **options).eval()
    model.load_adapter(str(adapter))
    return model


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", PACKAGES)
def test_load_adapter(folder_of: Folder, adapter: Adapter, name: str) -> None:
    """Within the least memory, with some weights that stay, and with all of them."""
    folder, lora = folder_of(name), adapter(name)
    without, reference = logits(fresh(folder), IDS), loaded(fresh(folder), lora)
    assert (logits(reference, IDS) - without).abs().max() > 0.1
    least = least_memory_with(folder, lora)
    some = {"cpu": least["cpu"] + 150_000}
    for budget, stays in ((least, {False}), (some, {False, True}), ("1GiB", {True})):
        with stream(folder, max_memory=budget) as model:
            assert torch.equal(logits(model, IDS), without)
            model.load_adapter(lora)
            assert {bool(batch.resident) for batch in model.plan.batches} == stays
            assert_equal(model, reference)
            assert_equal(model, reference)  # no pass leaves anything that the next one would see
            model.delete_adapter("default")
            assert torch.equal(logits(model, IDS), without)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", PACKAGES)
def test_peft_model(folder_of: Folder, adapter: Adapter, name: str, low_cpu_mem_usage: bool) -> None:
    folder, lora = folder_of(name), adapter(name)
    options = {"autocast_adapter_dtype": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    reference = loaded(fresh(folder), lora, **options)
    for budget in (least_memory_with(folder, lora), "1GiB"):
        with stream(folder, max_memory=budget) as base:
            model = loaded(base, lora, **options)
            assert_equal(model, reference)
            with model.disable_adapter(), reference.disable_adapter():
                assert_equal(model, reference)
            assert_equal(model.unload(), fresh(folder))


def test_on_an_accelerator(folder_of: Folder, adapter: Adapter, sim: SimDevice) -> None:
    folder, lora = folder_of("int8"), adapter("int8")
    with stream(folder, "sim:0", max_memory=least_memory_with(folder, lora, "sim:0")) as model:
        model.load_adapter(lora)
        assert_equal(model, on_accelerator(loaded(fresh(folder), lora)))


@pytest.mark.parametrize("name", OBJECTS)
def test_several_adapters(folder_of: Folder, adapter: Adapter, name: str) -> None:
    folder, first, second = folder_of(name), adapter(name), adapter(name, 2, target_modules=["q_proj", "up_proj"])
    of_first, of_second, base = loaded(fresh(folder), first), loaded(fresh(folder), second), fresh(folder)
    with stream(folder, max_memory={"cpu": least_memory_with(folder, first)["cpu"] + 300_000}) as model:
        model.load_adapter(first, adapter_name="a")
        model.load_adapter(second, adapter_name="b")
        assert_equal(model, of_second)
        model.set_adapter("a")
        assert_equal(model, of_first)
        model.disable_adapters()
        assert_equal(model, base)
        model.enable_adapters()
        assert_equal(model, of_first)
        model.delete_adapter("a")
        model.set_adapter("b")
        assert_equal(model, of_second)
        model.delete_adapter("b")
        assert_equal(model, base)


# --------------------------------------------------------------------------------------------------- what PEFT looks at


@pytest.mark.parametrize("name", OF_BITSANDBYTES)
def test_placeholders_say_how_weights_are_packed(folder_of: Folder, name: str) -> None:
    folder = folder_of(name)
    real = fresh(folder).model.layers[1].mlp.up_proj.weight
    said = ("quant_type", "compress_statistics", "blocksize") if "int8" not in name else ("has_fp16_weights",)
    with stream(folder) as model:
        placeholder = model.model.layers[1].mlp.up_proj.weight
        assert {key: getattr(placeholder, key) for key in said} == {key: getattr(real, key) for key in said}
        assert placeholder.dtype == real.dtype


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", OF_BITSANDBYTES)
def test_dora_on_weights_of_bitsandbytes_is_refused(folder_of: Folder, adapter: Adapter, name: str) -> None:
    """PEFT would put other weights in their place. The model is usable as before."""
    folder, dora = folder_of(name), adapter(name, target_modules=["q_proj", "down_proj"], use_dora=True)
    refused = pytest.raises(UnsupportedError, match=r"DoRA .* bitsandbytes .*q_proj\.weight.* --codec int8")
    with stream(folder, max_memory="1GiB") as model:
        names = [each for each, _ in model.named_modules()]
        with refused:
            model.load_adapter(dora)
        assert [each for each, _ in model.named_modules()] == names
        assert_equal(model, fresh(folder))
        model.load_adapter(plain := adapter(name))
        assert_equal(model, loaded(fresh(folder), plain))
    with AutoModel.from_pretrained(folder, device="cpu", max_memory="1GiB") as model:
        with refused:
            loaded(model, dora, low_cpu_mem_usage=True)(**IDS)
        if hasattr(model, "peft_config"):
            model.delete_adapter("default")
        assert_equal(model, fresh(folder))


def test_dora_on_weights_of_torchao(folder_of: Folder, adapter: Adapter) -> None:
    folder, dora = folder_of("int8"), adapter("int8", target_modules=["q_proj", "down_proj"], use_dora=True)
    options = {"low_cpu_mem_usage": True}
    with stream(folder, max_memory=least_memory_with(folder, dora)) as model:
        assert_equal(loaded(model, dora, **options), loaded(fresh(folder), dora, **options))
