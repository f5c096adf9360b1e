"""What a weight becomes: the same in one piece and in strips, and known before there are values."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from airstream import ArgumentError, UnsupportedError
from airstream.codecs.names import CODEC_NAMES, LOSSLESS_CODEC
from airstream.compat import four_bit_numbers, quantising
from airstream.compat.four_bit_numbers import nf4_numbers
from airstream.compat.quantising import CODECS, ROW_STEP, find_codec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight_of(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of many sizes, some rows of zeros, as experts that were never asked for have."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    weight[-1] = 0
    weight[:ROW_STEP, :128] = 0
    return weight.to(dtype)


def packages(name: str) -> None:
    if CODECS[name].module is not None:
        pytest.importorskip(str(CODECS[name].module))


def test_every_codec_has_a_name() -> None:
    assert {*CODECS, LOSSLESS_CODEC} == set(CODEC_NAMES)
    assert all(codec.name == name for name, codec in CODECS.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_is_that_of_bitsandbytes_and_found_sooner(dtype: torch.dtype) -> None:
    packages("nf4")
    from bitsandbytes.functional import quantize_4bit

    every = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()].repeat(32).to(dtype)
    for numbers in (weight_of(256, 192, dtype), every.view(-1, 64), every.view(64, -1).T):
        packed, state = quantize_4bit(numbers, blocksize=64, quant_type="nf4", compress_statistics=False)
        made = nf4_numbers(numbers)
        assert made is not None
        assert torch.equal(made[0], packed)
        assert torch.equal(made[1].view(torch.int32), state.absmax.view(torch.int32))


def test_scales_that_are_no_numbers_are_left_to_bitsandbytes() -> None:
    packages("nf4")
    assert nf4_numbers(torch.full((2, 64), torch.nan)) is None


def test_another_bitsandbytes_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    packages("nf4")
    weight = weight_of(128, 128, torch.bfloat16)
    expected = find_codec("nf4").of_rows(weight)
    monkeypatch.setattr(four_bit_numbers, "_bounds", lambda: [0.0] * 15)
    four_bit_numbers._is_as_bitsandbytes.cache_clear()
    try:
        assert nf4_numbers(weight) is None
        made = find_codec("nf4").of_rows(weight)
    finally:
        four_bit_numbers._is_as_bitsandbytes.cache_clear()
    assert all(torch.equal(made[end], expected[end]) for end in expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_strips_are_the_whole_and_headers_come_first(name: str, dtype: torch.dtype) -> None:
    packages(name)
    codec = CODECS[name]
    weight = weight_of(3 * ROW_STEP if name == "fp8" else 2 * ROW_STEP + 44, 256, dtype)
    whole = codec.of_rows(weight)
    strips = [codec.of_rows(strip) for strip in weight.split(ROW_STEP)]
    assert len(strips) == 3
    for end, tensor in whole.items():
        joined = torch.cat([strip[end] for strip in strips])
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8)), end
    made = whole | codec.of_weight(weight.to("meta"))
    said = codec.outputs(tuple(weight.shape), dtype)
    assert {end: (each.dtype, each.shape) for end, each in made.items()} == {
        end: (each.dtype, each.shape) for end, each in said.items()
    }
    assert all(each.is_meta for each in said.values())


@pytest.mark.parametrize(
    ("name", "shape", "fits"),
    [
        ("nf4", (32, 64), True),
        ("nf4", (32, 96), False),
        ("nf4", (48, 64), False),
        ("int8", (3, 5), True),
        ("int8", (3, 5, 2), False),
        ("int4", (3, 256), True),
        ("int4", (128, 200), False),
        ("fp8", (128, 256), True),
        ("fp8", (64, 256), False),
        ("fp8", (128, 200), False),
    ],
)
def test_what_fits(name: str, shape: tuple[int, ...], fits: bool) -> None:
    assert CODECS[name].fits(shape) is fits


def test_a_codec_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ArgumentError, match=r"codec='NF-4' is not .*: did you mean 'nf4'\? There is 'lossless', 'nf4', "
    ):
        find_codec("NF-4")
    with pytest.raises(ArgumentError, match=r"codec='zip' is not a codec: there is 'lossless', 'nf4', "):
        find_codec("zip")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in {"nf4": "bitsandbytes", "int8": "torchao", "int4": "compressed-tensors"}.items():
        with pytest.raises(
            UnsupportedError, match=rf"codec='{name}' needs .*: pip install {package} .*extra \"quant\""
        ):
            find_codec(name)
    assert find_codec("fp8") is quantising.CODECS["fp8"]
