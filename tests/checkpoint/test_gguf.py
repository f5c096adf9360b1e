"""GGUF files, streamed packed, are the model that transformers makes of them, to the bit."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from airstream import AutoModel
from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.gguf_outline import LONG, write_outline
from airstream.codecs.block_types import BLOCK_TYPES
from airstream.codecs.traffic import decoding_traffic
from airstream.compat.gguf import gguf_config
from airstream.errors import AirstreamError, ArgumentError, CheckpointNotFoundError, UnsupportedError
from airstream.layout.parts import Kind
from airstream.loading.options import LoadOptions
from airstream.loading.prepare import prepare
from airstream.plan.predict import predict
from airstream.plan.traffic import traffic_of
from airstream.transfer.piece import Cast
from tests.conftest import least_memory, on_accelerator, stream
from tests.stand_ins.comparing import assert_equal, logits, prompts
from tests.stand_ins.sim import SimDevice
from tests.stand_ins.tiny_gguf import TINY_GGUF, write_tiny_gguf

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
File = Callable[..., Path]
Resident = Callable[..., Any]

EVERY_TYPE = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S",
)  # fmt: skip


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> File:
    """`gguf(name, quant)`: a tiny file, written when first asked for."""
    root = tmp_path_factory.mktemp("gguf")

    @functools.cache
    def file_of(name: str, quant: str = "Q8_0", splits: int = 1) -> Path:
        folder = root / f"{name}-{quant}-{splits}"
        folder.mkdir()
        return write_tiny_gguf(name, folder / "model.gguf", quant, splits)

    return file_of


@pytest.fixture(scope="module")
def resident(gguf: File) -> Resident:
    """As transformers loads it. Its weights are copied to where allocators align them, as ours are."""

    @functools.cache
    def model_of(name: str, quant: str, dtype: torch.dtype | None) -> Any:
        file = gguf(name, quant)
        options = {} if dtype is None else {"dtype": dtype}
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
        return on_accelerator(model.eval())

    return model_of


def has_tables() -> bool:
    """Whether this transformers has tables of conversions for GGUF."""
    return importlib.util.find_spec("transformers.integrations.gguf") is not None


@pytest.mark.parametrize("dtype", [None, BF16], ids=str)
@pytest.mark.parametrize("name", TINY_GGUF)
def test_every_architecture(gguf: File, resident: Resident, name: str, dtype: torch.dtype | None) -> None:
    if name == "lfm2" and (not has_tables() or dtype is not None):
        pytest.skip("only newer transformers load it, and decode it in bfloat16 itself otherwise")
    reference = resident(name, "Q8_0", dtype)
    with stream(gguf(name, "Q8_0"), **({} if dtype is None else {"dtype": dtype})) as model:
        assert model.dtype == reference.dtype
        assert model.plan.streamed_bytes
        if dtype is None and name != "mamba":  # whose generate() this transformers cannot run either
            assert_equal(model, reference)
        else:
            assert torch.equal(logits(model, prompts(2, 9)), logits(reference, prompts(2, 9)))


@pytest.mark.parametrize("quant", EVERY_TYPE)
def test_every_type(gguf: File, resident: Resident, quant: str) -> None:
    for dtype in (FP32, FP16):
        with stream(gguf("llama", quant), dtype=dtype) as model:
            actual, expected = (logits(each, prompts(2, 9)) for each in (model, resident("llama", quant, dtype)))
            assert expected.isfinite().all()
            assert torch.equal(actual, expected)


def test_experts_are_read_as_they_lie(gguf: File) -> None:
    """Three merged tensors become two without anything but reads: no converter runs in the token loop."""
    prepared = prepare(gguf("qwen2moe", "Q4_0"), LoadOptions(device="cpu"))
    merged = [spec for spec in prepared.parts.specs_of(Kind.LAYER) if ".experts." in spec.name]
    assert len(merged) == 2 * len(prepared.parts.of(Kind.LAYER))
    assert all(spec.made_by is None for spec in merged)


def test_split_files(gguf: File, resident: Resident) -> None:
    """The weight of the lm_head is not in the first file: transformers, which reads one file only, would tie it."""
    first = gguf("llama", "Q8_0", 3)
    with stream(first) as model:
        assert len(model._engine.machinery.reader._files) == 3
        assert torch.equal(logits(model, prompts(2, 9)), logits(resident("llama", "Q8_0", FP32), prompts(2, 9)))


def test_ways_to_name_a_file(gguf: File) -> None:
    file = gguf("llama", "Q8_0")
    plans = [
        AutoModel.plan(name, device="cpu", max_context=64, **options)
        for name, options in ((file, {}), (file.parent, {}), (file.parent, {"gguf_file": file.name}))
    ]
    assert len({plan.checkpoint_bytes for plan in plans}) == 1
    with pytest.raises(CheckpointNotFoundError, match=r"has no file 'other\.gguf'; there are model\.gguf"):
        AutoModel.plan(file.parent, gguf_file="other.gguf")
    with pytest.raises(CheckpointNotFoundError, match="there is no file"):
        AutoModel.plan(file.with_name("other.gguf"))
    for outside in ("../model.gguf", "/model.gguf", "model.bin", "a\\b.gguf", "*.gguf"):
        with pytest.raises(ArgumentError, match="inside the repository"):
            AutoModel.plan(file.parent, gguf_file=outside)
    with pytest.raises(ArgumentError, match="is a file already"):
        AutoModel.plan(file, gguf_file=file.name)


def test_a_folder_of_several_models_asks_which(gguf: File, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).symlink_to(gguf("llama", "Q8_0"))
    with pytest.raises(ArgumentError, match=r"several models.*a\.gguf, b\.gguf"):
        AutoModel.plan(tmp_path)
    assert AutoModel.plan(tmp_path, gguf_file="b.gguf", device="cpu").streamed_bytes == 0


def test_the_tokenizer_comes_from_the_file(gguf: File) -> None:
    file = gguf("llama", "Q8_0")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with AutoModel.from_pretrained(file, device="cpu", max_context=64) as model:
        assert model.tokenizer("a b c")["input_ids"] == theirs("a b c")["input_ids"]
        messages = [{"role": "user", "content": "a b"}]
        assert model.tokenizer.apply_chat_template(messages, tokenize=False) == "a b"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", 1 << 31, "num_hidden_layers is 2,147,483,648; no model has more"),
        ("attention.head_count", 0, "does not describe a model|"),
    ],
)
def test_absurd_metadata(tmp_path: Path, key: str, value: int, message: str) -> None:
    file = write_tiny_gguf("llama", tmp_path / "x.gguf", fields={key: value})
    with pytest.raises(AirstreamError, match=message):
        AutoModel.plan(file)


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(write_tiny_gguf("llama", file).read_bytes().replace(b"llama", b"lamma"))
    with pytest.raises(UnsupportedError, match=r"transformers cannot read .*lamma"):
        AutoModel.plan(file)


def test_without_the_package_gguf(gguf: File, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf("llama", "Q8_0")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match=r"pip install gguf"):
        AutoModel.plan(file)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen2moe"])
def test_on_an_accelerator(gguf: File, resident: Resident, sim: SimDevice, name: str) -> None:
    """Packed bytes cross, and become numbers there. Norms are made by a converter, and rows by the host."""
    with stream(gguf(name, "Q4_0"), "sim:0", dtype=BF16) as model:
        actual = logits(model, prompts(2, 9))
        before = sim.h2d_bytes
        logits(model, prompts(2, 9))
        assert torch.equal(actual, logits(resident(name, "Q4_0", BF16), prompts(2, 9)))
        assert sim.h2d_bytes - before < model.plan.streamed_bytes / 2
        assert model.plan.tiers["0"].items["decoding"]
    assert sim.races == []


def test_resident_and_ready_weights_on_an_accelerator(gguf: File, resident: Resident, sim: SimDevice) -> None:
    expected = logits(resident("qwen3", "Q4_K", FP32), prompts(2, 9))
    with AutoModel.from_pretrained(gguf("qwen3", "Q4_K"), device="sim:0", max_context=64, max_memory="64GiB") as model:
        assert torch.equal(logits(model, prompts(2, 9)), expected)
    least = least_memory(gguf("qwen3", "Q4_K"), "sim:0", max_context=256, layers_per_batch=1, prefetch_batches=1)
    budget = {"cpu": "64GiB", 0: least[0]}
    with stream(gguf("qwen3", "Q4_K"), "sim:0", max_memory=budget, max_batch_size=1) as model:
        assert model.plan.hosted_bytes
        for _ in range(2):
            assert torch.equal(logits(model, prompts(2, 9)), expected)
    assert sim.races == []


def test_decoding_is_in_the_prediction(gguf: File) -> None:
    """What leaves the disk is packed; decoding costs time of the CPU."""
    budget = least_memory(gguf("llama", "Q4_0"), max_context=64)
    packed = AutoModel.plan(gguf("llama", "Q4_0"), device="cpu", max_memory=budget, max_context=64)
    assert packed.read_bytes < packed.streamed_bytes / 6
    prepared = prepare(gguf("llama", "Q4_0"), LoadOptions(device="cpu", max_context=64))
    assert prepared.facts.stored_bytes < prepared.facts.arithmetic.weight_bytes / 6
    traffic = traffic_of(packed, prepared.facts, on_cpu=True)
    free = replace(traffic, decoding_seconds_per_byte=0.0)
    hardware = prepared.request.hardware
    costs = predict(traffic, hardware, 1, 8, 64).links["compute"] - predict(free, hardware, 1, 8, 64).links["compute"]
    assert costs == pytest.approx(packed.read_bytes * traffic.decoding_seconds_per_byte / hardware.num_cores, rel=1e-6)
    assert costs > 0


def test_the_prediction_of_an_accelerator_counts_what_is_packed(gguf: File, sim: SimDevice) -> None:
    """What waits on the host and what comes from disk crosses packed, and is decoded in the device's memory."""
    options: dict[str, Any] = {"dtype": BF16, "max_context": 256, "layers_per_batch": 1, "prefetch_batches": 0}
    memory = least_memory(gguf("llama", "Q4_0"), "sim:0", **options) | {"cpu": "1GiB"}
    plan = AutoModel.plan(gguf("llama", "Q4_0"), device="sim:0", max_memory=memory, **options)
    prepared = prepare(gguf("llama", "Q4_0"), LoadOptions(device="sim:0", max_memory=memory, **options))
    moved, hardware = traffic_of(plan, prepared.facts, on_cpu=False), prepared.request.hardware
    assert plan.read_bytes == 0
    assert moved.h2d_bytes == plan.hosted_bytes < plan.streamed_bytes / 3
    free = predict(replace(moved, decoding_traffic_per_byte=0.0), hardware, 1, 8, 64).links
    links = predict(moved, hardware, 1, 8, 64).links
    traffic = prepared.facts.decoding_traffic_per_byte * plan.hosted_bytes
    assert links["memory bandwidth"] - free["memory bandwidth"] == pytest.approx(
        traffic / hardware.weights_rate("bfloat16").per_second
    )
    numbers = plan.streamed_bytes / 2
    expected = pytest.approx(decoding_traffic(BLOCK_TYPES["Q4_0"], BF16) * numbers, rel=0.15)
    assert traffic == expected, "more than the pages that so small groups end in"
    assert links["H2D"] == pytest.approx(plan.hosted_bytes / hardware.h2d.per_second)


def test_rotary_halves_are_one_read(gguf: File) -> None:
    """llama.cpp has the rows of queries and keys in another order: they are read as they lie and dealt out."""
    specs = prepare(gguf("llama", "Q4_0"), LoadOptions(device="cpu")).parts.specs
    (piece,) = specs["model.layers.0.self_attn.k_proj.weight"].pieces
    assert piece.cast == Cast(BLOCK_TYPES["Q4_0"], "float32", 64 * 8 * 18, 64 * 256 * 4, rows=64, ways=2)


@pytest.mark.parametrize("says_size", [False, True])
def test_a_vocabulary_is_counted_and_not_looked_at_to_find_the_config(tmp_path: Path, says_size: bool) -> None:
    """transformers takes the size from the number of words where no entry says it."""
    file = tmp_path / "words.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    if says_size:
        writer.add_vocab_size(LONG + 7)
    writer.add_token_list([f"word {number}" for number in range(LONG + 3)])
    writer.add_tensor("token_embd.weight", np.zeros((LONG + 3, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
    assert expected.vocab_size == LONG + (7 if says_size else 3)
    outline = tmp_path / "outline.gguf"
    write_outline(file, outline)
    assert outline.stat().st_size < 2 * LONG, "the words are not in it"
    assert gguf_config(GgufIndex.open(file)).to_dict() == expected.to_dict()


@pytest.mark.parametrize("name", sorted(TINY_GGUF))
def test_the_config_is_the_one_that_transformers_reads_of_the_whole_file(gguf: File, name: str) -> None:
    file = gguf(name, "Q8_0")
    expected = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    found = gguf_config(GgufIndex.open(file))
    assert type(found) is type(expected)
    assert found.to_dict() == expected.to_dict()
    assert found.name_or_path == expected.name_or_path
