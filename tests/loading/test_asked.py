"""`quantization_config=`: what it asks for is packed, once, as the library that it belongs to would; or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    QuantoConfig,
    TorchAoConfig,
)

import airstream
from airstream import ArgumentError, AutoModel, UnsupportedError
from airstream.repacking import write_quantised
from tests.conftest import STREAMING, least_memory
from tests.stand_ins.comparing import BF16, FP16, assert_equal
from tests.stand_ins.tiny_models import TINY, TinyModel, write_model

bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")
granularity = pytest.importorskip("torchao.quantization.granularity")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what transformers and the formats' packages warn of is theirs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FIELDS = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain checkpoints, by name: wide enough for all formats."""
    made = {}
    for name in ("llama", "llama-tied", "mixtral", "gpt2"):
        made[name] = tmp_path_factory.mktemp("plain") / name
        entry = TINY[name]
        write_model(TinyModel(entry.model_type, {**entry.fields, **FIELDS}), made[name], BF16)
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed copies, empty. Weights are quantised in several strips, though they are small."""
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(write_quantised, "STRIP_BYTES", 1)
    return tmp_path / "cache" / "packed"


def four(**fields: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, **{f"bnb_4bit_{name}": value for name, value in fields.items()})


def ao(kind: str, **fields: Any) -> TorchAoConfig:
    return TorchAoConfig(getattr(torchao, kind)(**fields))


OBJECTS: dict[str, Callable[[], Any]] = {
    "4bit": four,
    "nf4": lambda: four(quant_type="nf4", compute_dtype=BF16),
    "nf4 computed in float16": lambda: four(quant_type="nf4", compute_dtype="float16"),
    "nf4 double": lambda: four(quant_type="nf4", compute_dtype=BF16, use_double_quant=True),
    "fp4 double": lambda: four(use_double_quant=True),
    "fp4 stored as bfloat16": lambda: four(quant_storage="bfloat16"),
    "nf4 without some": lambda: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q_proj", "lm_head"]),
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "8bit with another threshold": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "8bit with the lm_head": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj"]),
    "int8": lambda: ao("Int8WeightOnlyConfig"),
    "int8 in groups": lambda: ao("Int8WeightOnlyConfig", granularity=granularity.PerGroup(64)),
    "int8 and activations": lambda: ao("Int8DynamicActivationInt8WeightConfig"),
    "int8 without some": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=["down_proj"]),
    "float8": lambda: ao("Float8WeightOnlyConfig"),
    "float8 of five bits": lambda: ao("Float8WeightOnlyConfig", weight_dtype=torch.float8_e5m2),
    "intx": lambda: ao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=granularity.PerGroup(32)),
}
"""By what it is, what gives an object that a CPU can do: a new one each time, for transformers changes some."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


@contextmanager
def streamed(folder: Path, cache: Path, make: Callable[[], Any], **options: Any) -> Iterator[tuple[Any, Path]]:
    """The checkpoint in `folder` as what `make` gives asks for, with the least memory; and the copy that it is."""
    AutoModel.from_pretrained(folder, device="cpu", quantization_config=make(), **options).close()
    ours = next(each for each in cache.parent.glob("packed/[!.]*") if each.is_dir()) if cache.exists() else folder
    options = STREAMING | options
    least = least_memory(ours, **options)
    with AutoModel.from_pretrained(
        folder, device="cpu", quantization_config=make(), max_memory=least, **options
    ) as model:
        yield model, ours


def contents(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    """The type, shape and bytes of a tensor; of text the text, which may have spaces behind it."""
    said = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
    return (json.loads(said),) if "quant_state" in name else (tensor.dtype, tensor.shape, said)


@pytest.mark.parametrize("name", OBJECTS)
def test_it_is_what_transformers_makes_of_it(folders: dict[str, Path], cache: Path, tmp_path: Path, name: str) -> None:
    """The logits to the bit, every tensor to the byte, and what config.json says."""
    make, dtype = OBJECTS[name], FP16 if "double" in name else "auto"
    reference = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=make(), dtype=dtype).eval()
    reference.save_pretrained(tmp_path / "theirs")  # before it computes, which packs it otherwise on some processors
    with streamed(folders["llama"], cache, make, dtype=dtype) as (model, ours):
        assert not model.plan.batches[0].resident
        assert_equal(model, reference)
    made, expected = (tensors_of(folder) for folder in (ours, tmp_path / "theirs"))
    assert made.keys() == expected.keys()
    for key, tensor in expected.items():
        assert contents(key, made[key]) == contents(key, tensor), key
    said = [
        json.loads((each / "config.json").read_text())["quantization_config"] for each in (ours, tmp_path / "theirs")
    ]
    assert said[0] == said[1]
    assert airstream.verify(ours, deep=True, progress=False).faults == ()


@pytest.mark.parametrize("name", ["nf4 double", "8bit with the lm_head", "int8 in groups"])
def test_a_plan_needs_no_weights(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    options: dict[str, Any] = {"max_memory": "150MiB", "device": "cpu", "page_cache": True, "max_context": 32}
    imagined = AutoModel.plan(tmp_path, quantization_config=OBJECTS[name](), **options)
    with AutoModel.from_pretrained(folders["llama"], quantization_config=OBJECTS[name](), **options) as model:
        assert imagined.checkpoint_bytes == model.plan.checkpoint_bytes
        assert imagined.resident_bytes == model.plan.resident_bytes


def test_fp8_is_the_codec(folders: dict[str, Path], cache: Path) -> None:
    """transformers quantises so on a GPU alone, and loads the result anywhere."""
    with streamed(folders["llama"], cache, FineGrainedFP8Config) as (model, ours):
        assert_equal(model, AutoModelForCausalLM.from_pretrained(ours).eval())
    named = airstream.repack(folders["llama"], cache / "named", codec="fp8", progress=False)
    made, expected = tensors_of(ours), tensors_of(named)
    assert {key: contents(key, each) for key, each in made.items()} == {
        key: contents(key, each) for key, each in expected.items()
    }


def test_fp8_in_other_blocks(folders: dict[str, Path], cache: Path) -> None:
    with streamed(folders["llama"], cache, lambda: FineGrainedFP8Config(weight_block_size=(64, 32))) as (model, ours):
        assert_equal(model, AutoModelForCausalLM.from_pretrained(ours).eval())
    assert tensors_of(ours)["model.layers.0.mlp.up_proj.weight_scale_inv"].shape == (384 / 64, 256 / 32)


def test_a_dict_means_the_same(folders: dict[str, Path], cache: Path) -> None:
    """What is the same is packed once, whatever is said of the machine."""
    fields = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    for given in (
        fields,
        fields | {"llm_int8_enable_fp32_cpu_offload": True},
        four(compute_dtype=BF16),
        four(compute_dtype=BF16).to_dict(),
    ):
        AutoModel.from_pretrained(folders["llama"], device="cpu", quantization_config=given).close()
        assert len(list(cache.glob("[!.]*"))) == 1
    for given in (four(), four(compute_dtype=BF16, quant_type="nf4")):
        AutoModel.from_pretrained(folders["llama"], device="cpu", quantization_config=given).close()
    AutoModel.from_pretrained(folders["llama"], device="cpu", quantization_config=fields, dtype=FP16).close()
    assert len(list(cache.glob("[!.]*"))) == 4


# ------------------------------------------------------------------------------------------------------------ refusals

REFUSALS: list[tuple[str, Callable[[], Any], str]] = [
    ("llama", lambda: four(quant_type="nf3"), r"has bnb_4bit_quant_type='nf3', .*: the nearest .*\"nf4\""),
    ("llama", lambda: four(compute_dtype="float64"), r"has bnb_4bit_compute_dtype='float64', .*\"nf4\""),
    ("llama", BitsAndBytesConfig, r"\(BitsAndBytesConfig\) has load_in_4bit=False, and load_in_8bit=False.*\"nf4\""),
    (
        "llama",
        lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True),
        r"has llm_int8_has_fp16_weight=True, which packs nothing: the nearest codec is compression=\"int8\"",
    ),
    ("llama", lambda: ao("Int4WeightOnlyConfig"), r"has quant_type=Int4WeightOnlyConfig.*nearest .*\"int4\""),
    (
        "llama",
        lambda: ao("Int8WeightOnlyConfig", granularity=granularity.PerTensor()),
        r"has granularity=PerTensor\(\), which cannot be made row by row: the nearest codec is compression=\"int8\"",
    ),
    (
        "llama",
        lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig(), include_input_output_embeddings=True),
        r"has include_input_output_embeddings=True, .*\"int8\"",
    ),
    ("llama", lambda: FineGrainedFP8Config(dequantize=True), r"has dequantize=True, .*\"fp8\""),
    ("llama", lambda: FineGrainedFP8Config(scale_fmt="ue8m0"), r"has scale_fmt='ue8m0', .*\"fp8\""),
    ("llama", lambda: FineGrainedFP8Config(weight_block_size=(96, 128)), r"has weight_block_size=\[96, 128\].*\"fp8\""),
    ("llama", Mxfp4Config, r"\(Mxfp4Config\) has quant_method='mxfp4', .*TorchAoConfig .*\"int4\""),
    ("llama", AwqConfig, r"\(AwqConfig\) has quant_method='awq', .*\"int4\""),
    ("llama", lambda: {"quant_method": "gptq", "bits": 8}, r"has quant_method='gptq', .*\"int8\""),
    ("llama", lambda: QuantoConfig(weights="int8"), r"\(QuantoConfig\) has quant_method='quanto', .*\"int8\""),
    (
        "llama-tied",
        lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj"]),
        r"\(BitsAndBytesConfig\) cannot have llm_int8_skip_modules=\['q_proj'\]: lm_head is one with the embedding",
    ),
    ("mixtral", four, r"quantization_config \(BitsAndBytesConfig\) would leave the experts"),
    ("gpt2", four, r"no layer of GPT2LMHeadModel has one"),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "make", "said"), REFUSALS)
def test_what_cannot_be_had(
    folders: dict[str, Path], cache: Path, folder: str, make: Callable[[], Any], said: str
) -> None:
    for load in (AutoModel.from_pretrained, AutoModel.plan):
        with pytest.raises(UnsupportedError, match=said) as caught:
            load(folders[folder], device="cpu", quantization_config=make())
        assert "\n" not in str(caught.value)
    assert not list(cache.glob("*/*")), "nothing was packed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization_config": "4bit"}, r"^quantization_config='4bit' is no object of transformers .*compression="),
        ({"quantization_config": {"quant_method": "zip"}}, r"Unknown quantization type, got zip.*compression="),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}},
            r"no field 'bnb_4bit_quant_typ': did you mean 'bnb_4bit_quant_type'\?",
        ),
        (
            {"quantization_config": {"load_in_4bit": True, "zip": 1}},
            r"no field 'zip': the fields are .*bnb_4bit_quant_type",
        ),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, "both True"),
        (
            {"quantization_config": four(), "load_in_4bit": True},
            r"load_in_4bit=True and quantization_config \(BitsAndBytesConfig\) contradict each other",
        ),
        (
            {"load_in_8bit": True, "quantization_config": {"quant_method": "fp8"}},
            r"quantization_config \(FineGrainedFP8Config\) and load_in_8bit=True contradict each other",
        ),
        (
            {"compression": "nf4", "quantization_config": four()},
            r"quantization_config \(BitsAndBytesConfig\) and compression='nf4' contradict each other",
        ),
    ],
)
def test_what_makes_no_sense(folders: dict[str, Path], options: dict[str, Any], said: str) -> None:
    for load in (AutoModel.from_pretrained, AutoModel.plan):
        with pytest.raises(ArgumentError, match=said):
            load(folders["llama"], **options)


# --------------------------------------------------------------------------------------------------- quantised already


@pytest.fixture(scope="module")
def quantised(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Quantised checkpoints, by codec."""
    out = tmp_path_factory.mktemp("quantised")
    return {name: airstream.repack(folders["llama"], out / name, codec=name, progress=False) for name in ("nf4", "fp8")}


SAME: list[tuple[str, Callable[[], Any]]] = [
    ("nf4", lambda: four(quant_type="nf4", compute_dtype=BF16)),
    ("nf4", lambda: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}),
    ("fp8", FineGrainedFP8Config),
    ("fp8", lambda: FineGrainedFP8Config(dequantize=True)),  # as a CPU does it anyway
]
"""By codec, what asks for it once more."""


def test_an_object_that_says_what_is_stored_changes_nothing(quantised: dict[str, Path], cache: Path) -> None:
    for codec, make in SAME:
        with streamed(quantised[codec], cache, make) as (model, _):
            assert_equal(model, AutoModelForCausalLM.from_pretrained(quantised[codec]).eval())
    assert not cache.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            four(compute_dtype=BF16),
            r"has bnb_4bit_quant_type='fp4', .* quantised already with 'nf4' \(.*config\.json\)",
        ),
        (BitsAndBytesConfig(load_in_8bit=True), r"has .*, and the checkpoint is quantised already with .*: leave"),
        (FineGrainedFP8Config(), r"asks for 'fp8', and the checkpoint is quantised with 'bitsandbytes' already"),
    ],
)
def test_an_object_that_says_something_else_is_an_error(quantised: dict[str, Path], given: Any, said: str) -> None:
    for load in (AutoModel.from_pretrained, AutoModel.plan):
        with pytest.raises(ArgumentError, match=said):
            load(quantised["nf4"], device="cpu", quantization_config=given)
