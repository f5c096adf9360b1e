"""This checks values of the command line: a mistake is told before anything is imported.

It refuses to know torch: dtypes are names here, devices are left to who can look for them.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence

from airstream.codecs.names import codec_named
from airstream.errors import ArgumentError
from airstream.reporting.units import parse_budget, parse_shard_size

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64", "bf16", "fp16", "fp32", "half", "float", "double")
"""Types that models compute in, by all their names."""

KEPT = re.compile("[\ud800-\udfff]")
"""What stands for bytes in text that Python could not read."""

LAYERS = re.compile(r"(\d*):(\d*)")

MEMORY = re.compile(r"cpu|\d+|[a-z]+:\d+")
DEVICE = re.compile(r"[a-z]+(:\d+)?|\d+")


def number(
    kind: type[int] | type[float],
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    word: str | None = None,
    or_zero: bool = False,
) -> Callable[[str], int | float | str]:
    """What makes a number of an argument, for `add_argument(type=...)`, and refuses one that is out of range.

    Args:
        word: may stand in the number's place, and is passed on as it is.
        or_zero: 0 is allowed as well.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most}
    wanted = " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None)
    others = f"{f', or {word}' if word else ''}{', or 0' if or_zero else ''}"
    noun = f"{'whole number' if kind is int else 'number'} {wanted}{others}"

    def convert(text: str) -> int | float | str:
        if word is not None and text == word:
            return text
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        too_small = (at_least is not None and value < at_least) or (above is not None and value <= above)
        if or_zero and value == 0:
            return value
        if not math.isfinite(value) or too_small or (at_most is not None and value > at_most):
            raise argparse.ArgumentTypeError(f"{text} must be a {noun}")
        return value

    return convert


def utf8(name: str, given: str) -> str:
    """`given`, the text called `name`, with what the bytes say that Python has kept because it could not read them.

    It keeps all that the locale's encoding lacks; where that is ASCII, any text.

    Raises:
        ArgumentError: they are no UTF-8.
    """
    if not KEPT.search(given):
        return given
    try:
        return given.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ArgumentError(f"{name} is not UTF-8 text: {error}") from error


def words(given: str) -> str:
    """Any text."""
    try:
        return utf8("the text", given)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def text(given: str) -> str:
    """Any text but none."""
    if not given:
        raise argparse.ArgumentTypeError("the text is empty")
    return words(given)


def dtype(given: str) -> str:
    """The name of a dtype that models compute in, as it was given."""
    if given.removeprefix("torch.") not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"{given!r} is not a type that models compute in: {', '.join(DTYPES)}. Weights are not quantised here: "
            "name a checkpoint that is (`airstream repack --codec` makes one)"
        )
    return given


def device(given: str) -> str:
    """`"cpu"`, `"cuda:0"`, `"auto"`: whether it is there, torch knows."""
    if not DEVICE.fullmatch(given):
        raise argparse.ArgumentTypeError(f"{given!r} is not a device: cpu, cuda or cuda:1")
    return given


def size(given: str) -> str:
    """`"4GiB"`, and not the 4 bytes that are left where the unit is forgotten."""
    return _checked(given, parse_budget)


def budget(given: str) -> str:
    """As `size`, or `"auto"` for most of what there is."""
    return given if given == "auto" else size(given)


def memory(given: str) -> str:
    """`"4GiB"`, or `"cpu=4GiB"` with the memory that it is for."""
    name, equals, nbytes = given.rpartition("=")
    if equals and not MEMORY.fullmatch(name):
        raise argparse.ArgumentTypeError(f"{given}: the memory is called cpu, or 0 for that of accelerator 0")
    budget(nbytes)
    return given


def parse_memory(sizes: Sequence[str]) -> str | dict[int | str, str]:
    """`["4GiB"]` is one size; `["0=4GiB", "cpu=8GiB"]` names the memory each is for."""
    if len(sizes) == 1 and "=" not in sizes[0]:
        return sizes[0]
    budgets: dict[int | str, str] = {}
    for item in sizes:
        name, equals, nbytes = item.rpartition("=")
        if not equals:
            raise ArgumentError(f"--max-memory {item}: with several, say which is which: --max-memory 0=4GiB cpu=8GiB")
        key = int(name) if name.isdigit() else name
        if key in budgets:
            raise ArgumentError(f"--max-memory {item}: {name} has {budgets[key]} already, leave one of them out")
        budgets[key] = nbytes
    return budgets


def shard_size(given: str) -> str:
    """`"4GiB"`: of a file, which holds one layer at least."""
    return _checked(given, parse_shard_size)


def layers(given: str) -> str:
    """`"5:15"`, `"5:"`, `":15"`: how many there are, the checkpoint knows."""
    found = LAYERS.fullmatch(given)
    if not found or (found[2] and int(found[1] or 0) >= int(found[2])):
        raise argparse.ArgumentTypeError(f"{given!r} names no layers: {_meant_layers(given)}")
    return given


def codec(given: str) -> str:
    """`"nf4"`: what a checkpoint is written in."""
    try:
        return codec_named(given)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("codec=")) from None


def _meant_layers(given: str) -> str:
    """What to write for the layers that `given` may mean, as far as it names any; they are counted from 0."""
    if re.fullmatch(r"\d{1,9}", given):
        return f"{given}:{int(given) + 1} is layer {given} alone, {given}: all from {given} on, :{given} those before"
    if re.fullmatch(r"\d{1,9}(-|:|\.\.|,)\d{1,9}", given):
        first, last = sorted(int(number) for number in re.findall(r"\d+", given))
        if first == last:
            return f"{first}:{first + 1} is layer {first}"
        end = last if ":" in given else last + 1
        return f"{first}:{end} are layers {first} to {end - 1}"
    return "5:15 are layers 5 to 14, 5: all from 5 on"


def _checked(given: str, parse: Callable[[str, str], int]) -> str:
    try:
        parse(given, "")
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("=")) from None
    return given
