"""GGUF files, streamed packed, are the model that transformers makes of them, to the bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import on_accelerator, stream
from tests.test_exactness import assert_equal
from tests.tiny_gguf import TINY_GGUF, write_tiny_gguf

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
        return on_accelerator(model.eval().requires_grad_(False))

    return model_of


@pytest.mark.parametrize("dtype", [None, BF16], ids=str)
@pytest.mark.parametrize("name", TINY_GGUF)
def test_every_architecture(gguf: File, resident: Resident, name: str, dtype: torch.dtype | None) -> None:
    reference = resident(name, "Q8_0", dtype)
    with stream(gguf(name, "Q8_0"), **({} if dtype is None else {"dtype": dtype})) as model:
        assert model.dtype == reference.dtype
        assert model.plan.streamed_bytes
        assert_equal(model, reference)


@pytest.mark.parametrize("quant", EVERY_TYPE)
def test_every_type(gguf: File, resident: Resident, quant: str) -> None:
    for dtype in (FP32, BF16, FP16):
        with stream(gguf("llama", quant), dtype=dtype) as model:
            assert_equal(model, resident("llama", quant, dtype))
