"""Weights in 4 bits whose rows are no whole blocks, or cannot be packed anew: bitsandbytes has no kernel for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import airstream
from airstream import AutoModel, UnsupportedError
from tests.conftest import stream
from tests.stand_ins.comparing import BF16, FP32, assert_equal, logits, prompts
from tests.stand_ins.tiny_models import TINY, TinyModel, tiny_tokenizer, write_model

nn = pytest.importorskip("bitsandbytes").nn
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the packages of formats
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NARROW = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32}
"""Only down_proj has rows of whole blocks."""

FEW_ROWS = {"intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
"""Keys and values have 16 rows, all columns are whole blocks."""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(dtype, **fields)`: a plain checkpoint."""

    def write(dtype: torch.dtype, **fields: Any) -> Path:
        write_model(TinyModel("llama", {**TINY["llama"].fields, **fields}), tmp_path / "plain", dtype)
        tiny_tokenizer().save_pretrained(tmp_path / "plain")
        return tmp_path / "plain"

    return write


def by_transformers(plain: Path, folder: Path, dtype: torch.dtype, kind: str = "nf4") -> Path:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fields", [NARROW, FEW_ROWS], ids=["columns", "rows"])
def test_a_weight_that_not_every_processor_computes_with_stays_as_it_is(
    write: Write, tmp_path: Path, fields: dict[str, Any]
) -> None:
    out = airstream.repack(write(BF16, **fields), tmp_path / "out", codec="nf4", progress=False)
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    ends = {name.rpartition(".")[2] for name in skipped}
    assert ends == ({"k_proj", "v_proj", "lm_head"} if fields is FEW_ROWS else ends - {"down_proj"})
    files = [load_file(file) for file in out.glob("*.safetensors")]
    assert any(name.endswith("down_proj.weight.absmax") for tensors in files for name in tensors)
    with stream(out) as model:
        assert_equal(model, AutoModelForCausalLM.from_pretrained(out).eval())


def test_no_weight_that_every_processor_computes_with(write: Write, tmp_path: Path) -> None:
    plain = write(BF16, **{**NARROW, "intermediate_size": 160, "head_dim": 24})
    said = r"a multiple of 32 rows and of 64 columns, and no layer of Llama"
    with pytest.raises(UnsupportedError, match=said):
        airstream.repack(plain, tmp_path / "out", codec="nf4", progress=False)
    with pytest.raises(UnsupportedError, match=rf"compression='4bit' .*{said}"):
        AutoModel.from_pretrained(plain, device="cpu", compression="4bit")


@pytest.mark.parametrize("kernels", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rows_that_are_no_whole_blocks_are_refused_before_a_pass(
    write: Write, tmp_path: Path, kind: str, kernels: str
) -> None:
    """Some of them bitsandbytes makes other numbers of, without a word; others it fails with."""
    packed = by_transformers(write(BF16, **NARROW), tmp_path / "packed", BF16, kind)
    said = r"model\.safetensors: tensor 'model\.layers\.0\..*_proj\.weight' \[\d+, 96\] .* a multiple of 64.* GPU.*int8"
    with pytest.raises(UnsupportedError, match=said):
        stream(packed, kernels=kernels)
    assert airstream.verify(packed, progress=False).faults == (), "it is sound"


def test_an_object_asks_for_rows_that_are_no_whole_blocks(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "cache"))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16)
    with pytest.raises(UnsupportedError, match=r"\[\d+, 96\] .* a multiple of 64"):
        AutoModel.from_pretrained(write(BF16, **NARROW), device="cpu", quantization_config=config)
    assert not list((tmp_path / "cache").glob("packed/[!.]*")), "nothing has been packed"


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_rows_that_cannot_be_packed_anew_are_computed_with_as_on_other_processors(
    write: Write, tmp_path: Path, dtype: torch.dtype
) -> None:
    packed = by_transformers(write(dtype, **FEW_ROWS), tmp_path / "packed", dtype)
    reference = AutoModelForCausalLM.from_pretrained(packed, dtype="auto").eval()
    for module in reference.modules():
        if isinstance(module, nn.Linear4bit) and module.out_features % 32:
            module.support_avx512bf16_for_cpu = False
    with stream(packed) as model:
        assert torch.equal(logits(model, prompts(2, 7)), logits(reference, prompts(2, 7)))
        assert torch.equal(logits(model, prompts(1, 1)), logits(reference, prompts(1, 1)))
    with stream(packed, kernels="fast", max_context=64) as model:
        assert logits(model, prompts(1, 3)).isfinite().all()
