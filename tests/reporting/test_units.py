"""Sizes are read as people write them, and printed so that people can read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from airstream.errors import ArgumentError
from airstream.reporting.units import GIB, KIB, MIB, format_bytes, format_seconds, parse_bytes, round_up

SIZES = {
    "4GiB": 4 * GIB,
    "4gib": 4 * GIB,
    "512MiB": 512 * MIB,
    "512 MB": 512_000_000,
    "1.5GiB": 3 * GIB // 2,
    ".5 GiB": GIB // 2,
    "2.GiB": 2 * GIB,
    "  7KiB ": 7 * KIB,
    "8GB": 8_000_000_000,
    "1KB": 1000,
    "1TiB": 1024 * GIB,
    "1TB": 10**12,
    "17": 17,
    "17B": 17,
    "4G": 4 * GIB,
    "4g": 4 * GIB,
    "512M": 512 * MIB,
    "64 k": 64 * KIB,
    "1T": 1024 * GIB,
    "4e9": 4_000_000_000,
    "1.5E+9": 1_500_000_000,
    "2e1GiB": 20 * GIB,
}


@pytest.mark.parametrize(("text", "nbytes"), SIZES.items(), ids=SIZES)
def test_parse_bytes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@given(st.integers(1, (1 << 63) - 1))
@example((1 << 53) + 1)  # the first that a float does not hold
def test_an_int_is_its_own_size(nbytes: int) -> None:
    assert parse_bytes(nbytes) == nbytes
    assert parse_bytes(str(nbytes)) == nbytes


@given(st.integers(1, 1 << 53))
def test_a_whole_float_is_a_size(nbytes: int) -> None:
    assert parse_bytes(float(nbytes)) == nbytes


@given(st.integers(1, 10**6), st.sampled_from([("KiB", KIB), ("GiB", GIB), ("TB", 10**12)]))
@example(999_999_999, ("GiB", GIB))
@example((1 << 52) + 1, ("KiB", KIB))
def test_a_large_size_is_exact(count: int, suffix: tuple[str, int]) -> None:
    assert parse_bytes(f"{count}{suffix[0]}") == count * suffix[1]
    assert parse_bytes(f"{count}.5{suffix[0]}") == count * suffix[1] + suffix[1] // 2


def test_no_memory_is_absurdly_large() -> None:
    for size in (9**400, f"{9**400}GiB", 1 << 63):
        with pytest.raises(ArgumentError, match="less than there are addresses"):
            parse_bytes(size)
    assert parse_bytes((1 << 63) - 1) == (1 << 63) - 1


NOT_A_SIZE = [
    "",
    " ",
    "GiB",
    "4 gigs",
    "4GiBs",
    "four",
    "-4GiB",
    "1e-9",
    "1e",
    "e9",
    "1e999",
    "4GiB 2",
    "1_000",
    "0x10",
    "4,5GiB",
    "nan",
    "inf",
]
NOT_A_SIZE += ["1..5", "\u0664GiB"]
TOO_SMALL = [0, -1, "0", "0GiB", "0.5", "0.0001KiB"]


@pytest.mark.parametrize(
    "size",
    [*NOT_A_SIZE, *TOO_SMALL, None, True, False, 1.5, float("inf"), float("nan"), b"4GiB", [4]],
    ids=lambda size: repr(size)[:16],
)
def test_what_is_not_a_size_is_refused_by_name(size: object) -> None:
    with pytest.raises(ArgumentError, match=r"^max_memory\['cpu'\]=") as caught:
        parse_bytes(size, "max_memory['cpu']")  # type: ignore[arg-type]
    assert repr(size) in str(caught.value)


FORMATTED = {
    0: "0 B",
    17: "17 B",
    1023: "1023 B",
    1024: "1.0 KiB",
    1536: "1.5 KiB",
    512 * KIB: "512 KiB",
    MIB - 1: "1.0 MiB",
    MIB: "1.0 MiB",
    99.9 * MIB: "99.9 MiB",
    100 * MIB: "100 MiB",
    GIB: "1.00 GiB",
    1.63 * GIB: "1.63 GiB",
    80 * GIB: "80.00 GiB",
    -1536: "-1.5 KiB",
}


@pytest.mark.parametrize(("nbytes", "text"), FORMATTED.items(), ids=FORMATTED.values())
def test_format_bytes(nbytes: float, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(1, 1 << 50))
def test_a_printed_size_can_be_parsed_and_is_close(nbytes: int) -> None:
    text = format_bytes(nbytes)
    assert re.fullmatch(r"[0-9.]+ (B|KiB|MiB|GiB)", text)
    assert abs(parse_bytes(text) - nbytes) <= 0.051 * nbytes  # the coarsest: 1.0 KiB stands for up to 1.05


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50))
def test_printed_sizes_are_in_order(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert small < KIB or parse_bytes(format_bytes(small)) <= parse_bytes(format_bytes(large))


SECONDS = {0.0: "0 ms", 0.85: "850 ms", 3.42: "3.42 s", 119.4: "119.40 s", 125: "2 min 05 s", 3600: "60 min 00 s"}


@pytest.mark.parametrize(("seconds", "text"), SECONDS.items(), ids=SECONDS.values())
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(0, 1e6))
def test_printed_seconds_add_up(seconds: float) -> None:
    text = format_seconds(seconds)
    if match := re.fullmatch(r"(\d+) min (\d\d) s", text):
        assert int(match[2]) < 60, text
        assert abs(int(match[1]) * 60 + int(match[2]) - seconds) <= 0.5
    else:
        assert re.fullmatch(r"\d+ ms|\d+\.\d\d s", text)


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_round_up(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple
