"""Kernels make quantised weights dense with the bits of transformers, and where they are wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from airstream.codecs.library import has_kernels
from airstream.compat import expanding
from airstream.compat.mapped_conversion import MappedConversion
from tests.stand_ins.comparing import BF16, FP32
from tests.stand_ins.tiny_models import TINY

pytestmark = pytest.mark.skipif(not has_kernels(), reason="kernels were not compiled")

FP8 = torch.float8_e4m3fn
SIDE = 64
"""Rows and columns that share a scale."""


def numbers(rows: int, columns: int) -> torch.Tensor:
    """Every number that there is in FP8, several times."""
    return torch.arange(rows * columns).remainder(256).to(torch.uint8).view(FP8).view(rows, columns)


def scales(rows: int, columns: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, columns, generator=generator) * 10.0 ** torch.arange(-6, columns - 6)).to(dtype)


def with_kernels() -> Any:
    operation = Fp8Dequantize(None)
    expanding.expand_with_kernels([WeightConverter(["weight", "weight_scale_inv"], "weight", [operation])])
    return operation


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what kernels have made dense."""
    made: list[torch.Size] = []
    real = expanding.make_dense

    def counting(weight: Any, first: int, out: torch.Tensor) -> None:
        made.append(out.shape)
        real(weight, first, out)

    monkeypatch.setattr(expanding, "make_dense", counting)
    return made


@pytest.mark.parametrize("dtype", [BF16, FP32, None], ids=str)
@pytest.mark.parametrize("scale_dtype", [BF16, FP32], ids=str)
def test_fp8_has_the_bits_of_transformers(
    runs: list[torch.Size], dtype: torch.dtype | None, scale_dtype: torch.dtype
) -> None:
    given = numbers(3 * SIDE, 12 * SIDE), scales(3, 12, scale_dtype)
    expected = Fp8Dequantize(None)._dequantize_one(*given, output_dtype=dtype)
    found = with_kernels()._dequantize_one(*given, output_dtype=dtype)
    assert runs
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num().float(), expected.nan_to_num().float())
    assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~found.isnan()])  # zeros have one, too


LEFT = {
    "groups of 16": (numbers(64, 64), scales(4, 4), BF16),
    "a scale a row": (numbers(64, 64), scales(64, 1), BF16),
    "oblong blocks": (numbers(64, 128), scales(2, 2), BF16),
    "another dtype": (numbers(64, 64), scales(1, 1), torch.float16),
    "scales of another dtype": (numbers(64, 64), scales(1, 1).half(), BF16),
    "experts in one tensor": (numbers(128, 64).view(2, 64, 64), scales(2, 1).view(2, 1, 1), BF16),
    "another FP8": (numbers(64, 64).view(torch.uint8).view(torch.float8_e5m2), scales(1, 1), BF16),
    "exponents": (numbers(64, 64), torch.full((1, 1), 120, dtype=torch.uint8), BF16),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_kernels_do_not_take_is_left_to_transformers(runs: list[torch.Size], name: str) -> None:
    *given, dtype = LEFT[name]
    expected = Fp8Dequantize(None)._dequantize_one(*given, output_dtype=dtype)
    found = with_kernels()._dequantize_one(*given, output_dtype=dtype)
    assert not runs
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_weight_is_written_where_it_is_wanted_unless_more_is_done_to_it(
    runs: list[torch.Size], is_turned: bool
) -> None:
    """Turned in the place that it was written to, it would be overwritten while it is copied."""
    operations = [Fp8Dequantize(None), *([Transpose(0, 1)] if is_turned else [])]
    sources = ["o_proj.weight", "o_proj.weight_scale_inv"] if is_turned else ["weight", "weight_scale_inv"]
    converter = WeightConverter(sources, sources[0], operations)
    expanding.expand_with_kernels([converter])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY["llama"].fields), dtype=BF16)
    name = "model.layers.0.self_attn.o_proj.weight"
    rows, columns = model.get_parameter(name).shape
    given = {name: numbers(rows, columns), f"{name}_scale_inv": scales(rows // 32, columns // 32)}
    keys = MappedConversion(model, mapping=[converter])
    into = torch.zeros(rows, columns, dtype=BF16)
    with_patterns = [(key, keys.rename(key)[1], tensor) for key, tensor in given.items()]
    made = keys.convert(name, with_patterns, into)[name]
    expected = Fp8Dequantize(None)._dequantize_one(*given.values(), output_dtype=BF16)
    assert runs
    assert torch.equal(made.nan_to_num(), (expected.t() if is_turned else expected).nan_to_num())
    assert made.is_set_to(into) is not is_turned
    assert bool(into.any()) is not is_turned
