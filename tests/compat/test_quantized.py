"""Checkpoints that were quantised before they were saved: streamed packed, equal to transformers' own to the bit."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping, get_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

from airstream import AutoModel, CheckpointError, UnsupportedError, verify
from airstream.checkpoint.safetensors import open_safetensors
from airstream.codecs.library import has_kernels
from airstream.compat import suspects
from airstream.compat.building import build_on_meta
from airstream.compat.classes import choose_class
from airstream.compat.integers import AWQ, CUTS_FUSED_WEIGHTS, GPTQ, Layout, with_unpacking
from airstream.compat.mapped_conversion import MappedConversion
from airstream.compat.quantizers import find_quantizer
from airstream.footprint.allocations import Allocations
from airstream.layout.byte_plan import read_specs
from airstream.layout.parts import Kind
from airstream.layout.tensors import RAW_PREFIX
from airstream.loading import packed
from airstream.loading.options import LoadOptions
from airstream.loading.prepare import prepare
from airstream.model.absent import Absent
from tests.conftest import least_memory, on_accelerator, smallest_budget, stream
from tests.matrix import formats
from tests.matrix.page import FORMAT_RESULTS
from tests.model.test_lifecycle import MEASURE
from tests.stand_ins.comparing import assert_equal, logits, prompts
from tests.stand_ins.quantized_models import (
    BITSANDBYTES,
    DENSE,
    FP8_MODELS,
    INTEGERS,
    _in_integers,
    write_bitnet,
    write_bitsandbytes,
    write_compressed,
    write_fp8,
    write_integers,
    write_mxfp4,
    write_torchao,
)
from tests.stand_ins.sim import SimDevice
from tests.stand_ins.tiny_models import TINY, write_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what transformers and the formats' packages warn of is theirs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BF16, FP32 = torch.bfloat16, torch.float32
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes")

Write = Callable[[Path], None]

FORMATS: dict[str, tuple[str | None, Write]] = {
    **{
        f"bitsandbytes {name}": ("bitsandbytes", lambda folder, name=name: write_bitsandbytes("llama", folder, name))
        for name in BITSANDBYTES
    },
    "bitsandbytes nf4 qwen2": ("bitsandbytes", lambda folder: write_bitsandbytes("qwen2", folder, "nf4-double")),
    **{f"fp8 {name}": (None, lambda folder, name=name: write_fp8(name, folder)) for name in FP8_MODELS},
    "mxfp4 gpt_oss": (None, write_mxfp4),
    "bitnet": (None, lambda folder: write_bitnet(folder, "bitlinear")),
    "bitnet autobitlinear": (None, lambda folder: write_bitnet(folder, "autobitlinear")),
    "torchao int8": ("torchao", lambda folder: write_torchao(folder, "Int8WeightOnlyConfig")),
    "torchao float8": ("torchao", lambda folder: write_torchao(folder, "Float8WeightOnlyConfig")),
    "compressed-tensors W4A16": ("compressed_tensors", lambda folder: write_compressed(folder, 4)),
    "compressed-tensors W8A16": ("compressed_tensors", lambda folder: write_compressed(folder, 8)),
    **{name: (None, lambda folder, name=name: write_integers(folder, name)) for name in INTEGERS},
}
"""By name: the package that it takes, if any but torch and accelerate, and what writes a checkpoint of it."""
DENSE_IN_PLACE = ("fp8", "mxfp4", "compressed-tensors", "gptq", "awq", "auto-round")
"""Formats that are dequantised in their slab, which any device can do."""
BY_KERNEL = ("compressed-tensors W4A16",)
"""Those that a kernel makes dense where they are to be: it takes groups of no fewer than 32."""
VARIANTS = ("gptq 8-bit v2", "gptq 3-bit", "gptq 2-bit", "awq qwen3_moe", "auto-round without offset")
"""Formats that differ from others in their arithmetic alone, which one test shows."""
ON_ACCELERATOR = [name for name in FORMATS if name.startswith((*DENSE_IN_PLACE, "torchao")) and name not in VARIANTS]
"""bitsandbytes' classes cannot wrap the simulated device's tensors; what is object about them, torchao's are, too."""


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`quantized(name)`: the folder of a checkpoint of that format, written when first asked for."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        package, write = FORMATS[name]
        if package is not None:
            pytest.importorskip(package)
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("quantized")
            write(folders[name])
        return folders[name]

    return folder_of


Quantized = Callable[[str], Path]


def resident_of(folder: Path) -> Any:
    """The model as transformers has it; of what transformers cannot load here, with the weights that were packed."""
    dense = folder / DENSE if is_integers(folder) else folder
    return AutoModelForCausalLM.from_pretrained(dense).eval()


def is_integers(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return config["quantization_config"].get("quant_method") in {each["quant_method"] for each in INTEGERS.values()}


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """BitNet's modules compile parts of themselves, which takes a C++ compiler and half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


# --------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", FORMATS)
def test_streamed_is_resident(quantized: Quantized, name: str) -> None:
    folder = quantized(name)
    with stream(folder) as model:
        assert all(not batch.resident for batch in model.plan.batches if batch.units[0] != "lm_head")
        assert_equal(model, resident_of(folder))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in VARIANTS])
def test_kept_is_resident(quantized: Quantized, name: str) -> None:
    """With room for everything, a part of it, and again with a part of it."""
    folder = quantized(name)
    reference, inputs = resident_of(folder), prompts(2, 9)
    expected = logits(reference, inputs)
    with AutoModel.from_pretrained(folder, device="cpu", max_context=64) as model:
        assert model.plan.streamed_bytes == 0
        for _ in range(3):
            assert torch.equal(logits(model, inputs), expected)
    budget = least_memory(folder, max_context=64)["cpu"]
    whole = least_memory(folder, max_context=64, prefetch_batches=0)["cpu"] + model.plan.resident_bytes // 2
    with AutoModel.from_pretrained(folder, device="cpu", max_context=64, max_memory=max(budget, whole)) as model:
        for _ in range(2):
            assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("name", ON_ACCELERATOR)
@pytest.mark.parametrize("where", ["disk", "host memory", "device memory"])
def test_on_an_accelerator(quantized: Quantized, sim: SimDevice, name: str, where: str) -> None:
    """Packed bytes travel, from wherever they are; the expanded ones are made where they compute."""
    folder = quantized(name)
    least = least_memory(folder, "sim:0", layers_per_batch=1, prefetch_batches=1, max_context=256, max_batch_size=4)
    more = {"disk": {}, "host memory": {"cpu": least["cpu"] + (8 << 20)}, "device memory": {0: least[0] + (8 << 20)}}
    with stream(folder, "sim:0", max_memory=least | more[where]) as model:
        assert bool(model.plan.hosted_bytes) == (where == "host memory")
        assert bool(model.plan.streamed_bytes) == (where != "device memory")
        inputs = prompts(2, 9)
        expected = logits(on_accelerator(resident_of(folder)), inputs)
        for _ in range(2):
            assert torch.equal(logits(model, inputs), expected)
    assert sim.races == []


@needs_bitsandbytes
@pytest.mark.parametrize("stored", [BF16, FP32])
def test_what_is_not_packed_keeps_its_type_as_in_transformers(tmp_path: Path, stored: torch.dtype) -> None:
    """transformers does not cast what its bitsandbytes loader sees, embeddings and norms included."""
    write_bitsandbytes("llama", tmp_path, "nf4", stored)
    # Under autograd bitsandbytes takes another kernel, which rounds in another way.
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    with stream(tmp_path, dtype=BF16) as model:
        assert model.model.norm.weight.dtype == reference.model.norm.weight.dtype
        inputs = prompts(1, 7)
        assert torch.equal(logits(model, inputs), logits(reference, inputs))


# ------------------------------------------------------------------------------------------- what travels, what is held


@pytest.mark.parametrize("name", FORMATS)
def test_packed_bytes_travel(quantized: Quantized, name: str) -> None:
    """What is read is what lies in the file: nothing that is packed is cast or expanded on its way."""
    folder = quantized(name)
    index = open_safetensors(folder)
    prepared = prepare(folder, LoadOptions(device="cpu", max_context=64))
    plain = [spec for spec in prepared.parts.specs.values() if spec.made_by is None]
    cast = [(spec, spec.pieces[0]) for spec in plain if spec.pieces[0].cast is not None]
    assert all(spec.name.endswith(".bias") for spec, _ in cast)  # bitsandbytes keeps these in float32
    assert prepared.facts.checkpoint_bytes <= index.nbytes + sum(spec.nbytes - piece.nbytes for spec, piece in cast)
    made = [spec for spec in prepared.parts.specs.values() if spec.made_by is not None]
    assert made or name == "bitnet"
    for source in (source for spec in made for source in spec.stored):
        (piece,) = source.pieces
        assert piece.cast is None
        assert piece.nbytes == index[source.name.removeprefix(RAW_PREFIX)].nbytes


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith(DENSE_IN_PLACE)])
def test_what_dequantising_takes_is_planned(quantized: Quantized, name: str) -> None:
    """The planned figure is found on the meta device; this runs the same converters on real tensors."""
    folder = quantized(name)
    prepared = prepare(folder, LoadOptions(device="cpu", max_context=64))
    tensors = load_file(folder / "model.safetensors")
    keys = MappedConversion(prepared.model, prepared.quantizer)
    conversions = {spec.made_by for spec in prepared.parts.specs.values()} - {None}
    assert conversions
    by_kernel = 0
    for conversion in conversions:
        assert conversion is not None
        names = [source.name.removeprefix(RAW_PREFIX) for source in conversion.sources]
        sources = [(key, pattern, tensors[key]) for key, pattern in zip(names, conversion.patterns, strict=True)]
        spec = prepared.parts.specs[conversion.name]
        into = torch.empty(spec.shape, dtype=spec.dtype)
        with Allocations([into, *(tensor for _, _, tensor in sources)]) as allocations:
            made = keys.convert(conversion.name, sources, into)
        by_kernel += made[conversion.name].is_set_to(into)
        assert allocations.peak_bytes <= conversion.scratch_bytes + 256
        assert allocations.peak_bytes or made[conversion.name].is_set_to(into)
    assert by_kernel == (len(conversions) if name in BY_KERNEL and has_kernels() else 0)


def test_what_a_kernel_takes_is_predicted(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a second for a number: that many for the bytes that hold it."""
    if not has_kernels():
        pytest.skip("kernels were not compiled")
    monkeypatch.setattr(packed, "dense_seconds", {"int4": 1.0}.__getitem__)
    prepared = prepare(quantized("compressed-tensors W4A16"), LoadOptions(device="cpu", max_context=64))
    specs = {spec.name: spec for spec in prepared.parts.specs_of(Kind.LAYER, Kind.HEAD)}.values()
    numbers = sum(math.prod(spec.shape) for spec in specs if spec.made_by is not None)
    stored = sum(sum(source.nbytes for source in spec.stored) for spec in specs)
    assert prepared.facts.decoding_seconds_per_byte == pytest.approx(numbers / stored)
    assert prepared.facts.stored_bytes is None


def test_what_equal_layers_take_is_found_out_once(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter of a large weight takes a tenth of a second even without values, and a model has hundreds of them."""
    runs: list[str] = []
    real = MappedConversion.convert

    def counting(self: MappedConversion, name: str, *given: Any) -> Any:
        runs.append(name)
        return real(self, name, *given)

    monkeypatch.setattr(MappedConversion, "convert", counting)
    prepared = prepare(quantized("gptq 4-bit"), LoadOptions(device="cpu", max_context=64))
    made = [spec for spec in prepared.parts.specs.values() if spec.made_by is not None]
    assert len({re.sub(r"\d+", "", spec.name) for spec in made}) == len(runs) < len(made)


@pytest.mark.parametrize("layout", [GPTQ, AWQ])
def test_every_mapping_takes_packed_weights(layout: Layout) -> None:
    """Of every type that transformers has one for: merges of many weights, and cuts of one into several."""
    for name in _build_checkpoint_conversion_mapping():
        mapping = get_checkpoint_conversion_mapping(name)
        assert len(with_unpacking(mapping, layout)) > len(mapping)


@pytest.mark.skipif(not CUTS_FUSED_WEIGHTS, reason="older transformers do not let us")
def test_a_fused_weight_is_unpacked_and_cut() -> None:
    cut = WeightConverter("mlp.both.weight", ["mlp.gate.weight", "mlp.up.weight"], [Chunk(dim=0)])
    (packed,) = [entry for entry in with_unpacking([cut], GPTQ) if isinstance(entry.operations[-1], Chunk)][1:]
    expected, made = _in_integers(torch.ones(64, 64), INTEGERS["gptq 4-bit"], torch.Generator().manual_seed(0))
    for key, tensor in made.items():
        packed.add_tensor("mlp.gate.weight", f"mlp.both.{key}", f"mlp.both.{key}", lambda tensor=tensor: tensor)
    halves = packed.convert("mlp.gate.weight")
    assert torch.equal(torch.cat([halves["mlp.gate.weight"], halves["mlp.up.weight"]]), expected)


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["bitsandbytes nf4-double", "bitsandbytes int8"])
def test_a_pass_leaves_nothing_behind(quantized: Quantized, name: str) -> None:
    """Objects are made once for each place in the ring, and give all memory back when the model is closed."""
    with stream(quantized(name)) as model:
        built = 0
        real = MappedConversion.assemble

        def counting(self: MappedConversion, *arguments: Any) -> Any:
            nonlocal built
            built += 1
            return real(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MappedConversion, "assemble", counting)
            for _ in range(8):  # until every layer has been in every place of the ring
                logits(model, prompts(1, 5))
            before = built
            assert before > 0
            logits(model, prompts(1, 5))
            assert built == before
        linear = model.model.layers[0].mlp.up_proj
        assert isinstance(linear.weight, Absent)
        assert getattr(linear, "quant_state", None) is None
        assert getattr(getattr(linear, "state", None), "CB", None) is None
        assert getattr(linear.weight, "SCB", None) is None


# ------------------------------------------------------------------------------------------------------ what is refused


def with_settings(folder: Path, settings: dict[str, Any]) -> Path:
    """A dense checkpoint in `folder` whose config says that it is quantised."""
    write_model(TINY["llama"], folder, BF16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "gptq checkpoint packed as 'marlin' cannot",
        ),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "packed as .* in 32-bit words"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "packed as 'gemv' cannot be .* only 'gemm'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fp8"}, "packed as 'auto_round:fp8'"),
        ({"quant_method": "hqq"}, "hqq cannot be streamed: transformers cannot load it .* Stream a checkpoint"),
        ({"quant_method": "quanto"}, "quanto cannot be streamed"),
        ({"quant_method": "nonsense"}, "'nonsense' .*which this transformers does not know"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "eetq"}, "eetq"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8}}},
            },
            "quantised activations .* cannot be streamed",
        ),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_what_cannot_be_streamed_says_why(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    folder = with_settings(tmp_path, settings)
    for load in (AutoModel.plan, AutoModel.from_pretrained):
        with pytest.raises(UnsupportedError, match=reason):
            load(folder, device="cpu")


@pytest.mark.parametrize(
    ("method", "package"), [("bitsandbytes", "bitsandbytes"), ("torchao", "torchao"), ("fp8", "accelerate")]
)
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, package: str) -> None:
    settings = {"quant_method": method, "load_in_4bit": method == "bitsandbytes"}
    if method == "torchao":
        settings["quant_type"] = {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}, "_version": 2}}
    folder = with_settings(tmp_path, settings)

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError(f"requires {package}")

    monkeypatch.setattr("airstream.compat.quantizers.get_hf_quantizer", missing)
    packages = package if package == "accelerate" else f"{package} accelerate"
    with pytest.raises(
        UnsupportedError,
        match=f"quantised with {method} need more packages: pip install {packages} .requires {package};",
    ):
        AutoModel.plan(folder, device="cpu")


def respelled(folder: Path, copy: Path, **settings: Any) -> Path:
    """A copy of the checkpoint in `folder` whose config says other things of how it is quantised."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= settings
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_what_a_config_says_of_the_machine_that_saved_it_changes_nothing(tmp_path: Path, name: str) -> None:
    """transformers packs nothing on a processor if the config allows that, and weights that are packed do not fit."""
    write_bitsandbytes("llama", tmp_path / "saved", name)
    other = respelled(tmp_path / "saved", tmp_path / "other", llm_int8_enable_fp32_cpu_offload=True)
    ids = torch.tensor([[3, 4, 5]])
    with stream(tmp_path / "saved") as saved, stream(other) as model:
        assert torch.equal(model(ids).logits, saved(ids).logits)


@pytest.mark.parametrize("value", [7, True, 1.5], ids=str)
def test_the_field_of_a_quantisation_that_makes_no_sense_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    monkeypatch.setattr(suspects, "MAX_SECONDS", 10.0)
    write_fp8("llama", tmp_path / "saved")
    folder = respelled(tmp_path / "saved", tmp_path / "other", modules_to_not_convert=value)
    with pytest.raises(CheckpointError, match=r"config\.json.*quantization_config\.modules_to_not_convert \("):
        stream(folder)


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    **{
        f"{name} {field}={value}": (name, {field: value}, rf"tensor '.*' \[4, .*has {own}.* says {field}={value}:")
        for name in ("gptq 4-bit", "awq", "auto-round")
        for field, value, own in [
            ("bits", 8, "4 bits"),
            ("bits", 3, "4 bits"),
            *(("group_size", size, "4 groups of 32 inputs") for size in (16, 64, -1, 0)),
        ]
    },
    **{
        f"gptq {field}={value!r}": (
            "gptq 4-bit",
            {field: value},
            rf"quantization_config\.{field} is '.*no whole number",
        )
        for field, value in [("bits", "4"), ("bits", True), ("group_size", 32.0), ("group_size", [32])]
    },
    "gptq of some layers": (
        "gptq 4-bit",
        {"bits": 8, "dynamic": {"+:.*down_proj": {"bits": 2}}},
        "4 bits.*says bits=8 or 2",
    ),
    "bitsandbytes of 8 bits, called 4": (
        "bitsandbytes int8",
        {"load_in_8bit": False, "load_in_4bit": True},
        "weights of 8 bits.*load_in_4bit=true",
    ),
    "bitsandbytes of 4 bits, called 8": (
        "bitsandbytes nf4",
        {"load_in_8bit": True, "load_in_4bit": False},
        "weights of 4 bits.*load_in_8bit=true",
    ),
    **{
        f"compressed-tensors {field}={value}": (
            "compressed-tensors W4A16",
            {field: value},
            rf"weight_packed' \[.*128 bits for each of 4 scales .*{field}={value}",
        )
        for field, value in [("num_bits", 8), ("group_size", 16), ("group_size", 64)]
    },
}
"""By what is wrong: a format, what the config says, and what is said of it."""


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_shapes_that_contradict_what_the_config_says(quantized: Quantized, tmp_path: Path, case: str) -> None:
    name, settings, said = CONTRADICTIONS[case]
    saved = quantized(name)
    if name.startswith("compressed"):
        groups = json.loads((saved / "config.json").read_text())["quantization_config"]["config_groups"]
        groups["group_0"]["weights"] |= settings
        settings = {"config_groups": groups}
    folder = respelled(saved, tmp_path / "other", **settings)
    with pytest.raises(CheckpointError, match=said) as raised:
        stream(folder)
    assert str(folder) in str(raised.value), "the message names the file"
    assert any(re.search(said, fault) for fault in verify(folder, progress=False).faults)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8, "dynamic": {"+:.*": {"bits": 4}}},
        {"bits": 2, "extra_config": {"model.layers.0.mlp.down_proj": {"bits": 4}}},
        {"group_size": 128, "dynamic": {"-:lm_head": {}, ".*": {"group_size": 32}}},
        {"bits": None, "group_size": None},
        {"bits": None, "w_bit": 4, "group_size": None, "q_group_size": 32},
    ],
    ids=str,
)
def test_a_config_may_say_other_things_of_some_layers_or_nothing(
    quantized: Quantized, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = respelled(quantized("gptq 4-bit"), tmp_path / "other", **settings)
    with stream(folder) as model, stream(quantized("gptq 4-bit")) as saved:
        assert torch.equal(logits(model, prompts(1, 3)), logits(saved, prompts(1, 3)))


def test_a_group_size_that_does_not_divide_the_inputs(quantized: Quantized, tmp_path: Path) -> None:
    """A row of 64 or 128 is one group of 200 at most, by what the config says."""
    folder = tmp_path / "other"
    respelled(quantized("gptq 4-bit"), folder, group_size=200)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith((".scales", ".qzeros"))]:
        tensors[key] = tensors[key][:1].contiguous()
    for key in [key for key in tensors if key.endswith(".g_idx")]:
        tensors[key] = torch.zeros_like(tensors[key])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with stream(folder) as model:
        assert logits(model, prompts(1, 3)).isfinite().all()


@pytest.mark.parametrize("part", ["qweight", "qzeros", "g_idx"])
def test_integers_that_are_stored_as_other_numbers(quantized: Quantized, tmp_path: Path, part: str) -> None:
    folder = respelled(quantized("gptq 4-bit"), tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith(part))
    save_file(tensors | {key: tensors[key].float()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{key}' .*numbers of type F32.*packs I32"):
        stream(folder)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("gptq 4-bit act-order", lambda tensors, key: tensors[key + "g_idx"].fill_(9_999)),
        ("gptq 4-bit act-order", lambda tensors, key: tensors[key + "g_idx"].fill_(-7)),
    ],
    ids=["too large", "negative"],
)
def test_values_that_no_weight_can_be_made_of(
    quantized: Quantized, tmp_path: Path, name: str, spoil: Callable[[dict[str, torch.Tensor], str], Any]
) -> None:
    folder = respelled(quantized(name), tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors, "model.layers.1.mlp.up_proj.")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with (
        stream(folder) as model,
        pytest.raises(CheckpointError, match=r"packed tensors of 'model\.layers\.1\.mlp\.up_proj\.weight' cannot be"),
    ):
        logits(model, prompts(1, 3))


@needs_bitsandbytes
@pytest.mark.parametrize("listed", [[], ["x"]], ids=str)
def test_a_weight_that_is_not_packed_where_it_should_be(tmp_path: Path, listed: list[str]) -> None:
    write_bitsandbytes("llama", tmp_path / "saved", "nf4")
    folder = respelled(tmp_path / "saved", tmp_path / "other", llm_int8_skip_modules=listed)
    with pytest.raises(CheckpointError, match=r"safetensors: tensor 'lm_head\.weight' .*llm_int8_skip_modules"):
        stream(folder)


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors")
@pytest.mark.parametrize("groups", [None, {}], ids=str)
def test_a_config_that_no_tensor_can_be_converted_by(tmp_path: Path, groups: Any) -> None:
    write_compressed(tmp_path / "saved", 4)
    folder = respelled(tmp_path / "saved", tmp_path / "other", config_groups=groups)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(folder))} cannot be converted as its config\.json says"
    ):
        stream(folder)
    assert any(str(folder) in fault for fault in verify(folder, progress=False).faults)


def test_a_config_without_weights_is_not_enough(quantized: Quantized, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((quantized("fp8 llama") / "config.json").read_text())
    with pytest.raises(UnsupportedError, match="quantised with fp8, and only its config is here"):
        AutoModel.plan(tmp_path, device="cpu")


@needs_bitsandbytes
@pytest.mark.parametrize("spoiled", ["quant_state", "absmax"])
def test_packed_tensors_that_do_not_go_together(quantized: Quantized, tmp_path: Path, spoiled: str) -> None:
    folder = quantized("bitsandbytes nf4")
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if ".layers.1." in key and spoiled in key)
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    said = rf"model\.safetensors: tensor '{re.escape(key.partition('.bitsandbytes')[0])}', of the same packed weight as"
    with pytest.raises(CheckpointError, match=rf"{said} 'model\.layers\.1\..* is missing"):
        stream(tmp_path)
    assert any(re.search(said, fault) for fault in verify(tmp_path, progress=False).faults)


def with_shape(folder: Path, copy: Path, end: str, change: Callable[[list[int]], list[int]]) -> str:
    """A copy of `folder` whose header gives another shape to a tensor whose name ends with `end`. Gives the name."""
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    name = next(key for key in header if ".layers.1." in key and key.endswith(end))
    header[name]["shape"] = change(header[name]["shape"])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    return name


WRONG_SHAPES: dict[str, tuple[str, str, Callable[[list[int]], list[int]]]] = {
    "quant_map": ("bitsandbytes nf4", "k_proj.weight.quant_map", lambda shape: [1, *shape]),
    "absmax": ("bitsandbytes nf4", "k_proj.weight.absmax", lambda shape: [*shape, 1]),
    "SCB": ("bitsandbytes int8", "k_proj.SCB", lambda shape: [1, *shape]),
    "8 bits, turned": ("bitsandbytes int8", "k_proj.weight", lambda shape: shape[::-1]),
    "weight_scale": ("compressed-tensors W4A16", "k_proj.weight_scale", lambda shape: [1, *shape]),
    "qdata, turned": ("torchao int8", "k_proj._weight_qdata", lambda shape: shape[::-1]),
    "torchao's scale": ("torchao int8", "k_proj._weight_scale", lambda shape: [1, *shape]),
}
"""By what is wrong: a format, the end of a name, and the shape that the header gives to it."""


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_packed_tensors_of_wrong_shapes_are_named_before_a_pass(
    quantized: Quantized, tmp_path: Path, case: str
) -> None:
    format_name, end, change = WRONG_SHAPES[case]
    folder = tmp_path / "other"
    name = with_shape(quantized(format_name), folder, end, change)
    said = rf"other/model\.safetensors: tensor '{re.escape(name)}'.* has shape \["
    with pytest.raises(CheckpointError, match=said):
        AutoModel.from_pretrained(folder, device="cpu")
    assert sum(re.search(said, fault) is not None for fault in verify(folder, progress=False).faults) == 1


# ------------------------------------------------------------------------------------ what needs a GPU: its byte plan


@pytest.mark.parametrize("name", FP8_MODELS)
def test_on_a_gpu_fp8_is_streamed_as_it_lies(quantized: Quantized, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where there are FP8 kernels nothing is dequantised: every packed tensor and every scale is planned as bytes."""
    folder = quantized(f"fp8 {name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    config = AutoConfig.from_pretrained(folder)
    device = torch.device("cuda", 0)
    quantizer = find_quantizer(config, device)
    assert quantizer is not None
    model = build_on_meta(*choose_class(config, folder, trust_remote_code=False), BF16, None)
    index = open_safetensors(folder)
    quantizer.preprocess(model, BF16, device, index.files)
    specs = read_specs(model, index, BF16, quantizer)
    assert all(spec.made_by is None for spec in specs.values())
    packed = [spec for spec in specs.values() if spec.dtype == torch.float8_e4m3fn]
    scales = [spec for spec in specs.values() if spec.name.endswith("scale_inv")]
    assert len(packed) == len(scales) > 0
    assert all(spec.dtype == FP32 and all(piece.cast is None for piece in spec.pieces) for spec in scales)


# ---------------------------------------------------------------------------------------------------------------- peak


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
@pytest.mark.parametrize("name", ["bitsandbytes nf4-double", "fp8"])
def test_the_peak_stays_within_the_plan(large: Callable[[str], Path], name: str) -> None:
    folder = large(name)
    budget = str(smallest_budget(folder, layers_per_batch=1, max_context=128, page_cache=False)["cpu"])
    measure = MEASURE.replace("tokens=28", "tokens=4")  # a pass takes seconds, and the peak is in the first one
    result = subprocess.run(
        [sys.executable, "-c", measure, str(folder), budget], capture_output=True, text=True, check=True
    )
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["rise"] > measured["ring"]
    assert measured["rise"] <= measured["planned"]


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints whose layers are large enough for a kernel's count of memory to show them."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name.startswith("bitsandbytes"):
            pytest.importorskip("bitsandbytes")
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("large")
            if name == "fp8":
                write_fp8("large", folders[name])
            else:
                write_bitsandbytes("large", folders[name], name.removeprefix("bitsandbytes "))
        return folders[name]

    return folder_of


# ---------------------------------------------------------------------------------------------------------------- docs


def test_the_results_are_of_these_formats() -> None:
    results = json.loads(FORMAT_RESULTS.read_text(encoding="utf-8"))
    tested = {row["format"] for row in results["formats"] if row["verdict"] in (formats.TESTED, formats.TESTED_DENSE)}
    assert tested == FORMATS.keys()


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="no compressed-tensors")
def test_nothing_is_said_of_weights_that_have_no_values_yet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """compressed-tensors has a log of its own, which goes to the terminal."""
    write_compressed(tmp_path, 8)
    from compressed_tensors.logger import logger

    heard: list[str] = []
    sink = logger.add(heard.append)
    try:
        with stream(tmp_path, max_context=64) as model:
            logits(model, prompts(1, 3))
        logger.bind(name="compressed_tensors").warning("it speaks again")
    finally:
        logger.remove(sink)
    assert [line for line in heard if "Cannot recover" in line] == []
    assert len(heard) == 1
