"""This writes bytes, seconds and numbers of things as people do. It knows nothing of models or devices."""

from __future__ import annotations

import re
from decimal import Decimal

from airstream.errors import ArgumentError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

LEAST_BUDGET = MIB
"""Bytes that no model does with: a number below is one whose unit was forgotten."""

LEAST_SHARD = MIB
"""Bytes of a file that it pays to begin: a number below is one whose unit was forgotten."""

_SUFFIXES = {"": 1, "b": 1} | {
    prefix + ending: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for ending, base in (("ib", 1024), ("", 1024), ("b", 1000))
}
"""A letter alone is a binary unit, as for container engines and schedulers."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(e\+?[0-9]{1,2})?\s*([a-zA-Z]*)\s*", re.IGNORECASE)


def parse_bytes(size: int | float | str, name: str = "size") -> int:
    """The number of bytes in `size`: an int, a whole float, or a string such as `"4GiB"`, `"512 MB"`, `"4e9"`.

    Raises:
        ArgumentError: `size` is not a size; the message calls it `name`.
    """
    if isinstance(size, int | float) and not isinstance(size, bool) and size % 1 == 0:  # not for infinity, NaN
        nbytes = int(size)
    else:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None or match[3].lower() not in _SUFFIXES:
            raise ArgumentError(
                f'{name}={size!r} is not a size: use a number of bytes, or one with a unit, such as "4GiB" or "512MB"'
            )
        nbytes = int(Decimal(match[1] + (match[2] or "")) * _SUFFIXES[match[3].lower()])
    if not 1 <= nbytes < 1 << 63:
        raise ArgumentError(f"{name}={size!r} must be at least one byte, and less than there are addresses")
    return nbytes


def parse_budget(size: int | float | str, name: str = "size") -> int:
    """As `parse_bytes`, of memory for a model: a size in which none runs is refused, with a guess at what was meant."""
    nbytes = parse_bytes(size, name)
    if nbytes >= LEAST_BUDGET:
        return nbytes
    text = str(size).strip()
    guess = f'; did you mean "{text}{"GiB" if nbytes < KIB else "MiB"}"?' if text.isdigit() else ""
    raise ArgumentError(f"{name}={size!r} is {format_bytes(nbytes)}, in which no model runs{guess}")


def parse_shard_size(size: int | float | str, name: str = "shard_size") -> int:
    """As `parse_bytes`, of what a file of weights should not be larger than: one that no file keeps to is refused."""
    nbytes = parse_bytes(size, name)
    if nbytes >= LEAST_SHARD:
        return nbytes
    text = str(size).strip()
    guess = f'; did you mean "{text}{"GiB" if nbytes < KIB else "MiB"}"?' if text.isdigit() else ""
    raise ArgumentError(
        f"{name}={size!r} is {format_bytes(nbytes)}, and layers, which are not cut, are larger: name "
        f"{format_bytes(LEAST_SHARD)} at least{guess}"
    )


def counted(number: int, noun: str) -> str:
    """`"1 file"`, `"2 batches"`, `"1,024 new tokens"`: nouns that add an s or es, and no others."""
    ending = "es" if noun.endswith(("ch", "s")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def format_bytes(nbytes: float) -> str:
    """`nbytes` in binary units, three digits: `"1.63 GiB"`, `"512 KiB"`, `"17 B"`."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1023.95:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 99.95 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def format_rate(bytes_per_second: float) -> str:
    """`bytes_per_second` for people, never as nothing: `"2.41 GB/s"`, `"87.30 MB/s"`, `"0.52 kB/s"`."""
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_second >= 0.1 * size:
            return f"{bytes_per_second / size:.2f} {unit}"
    return f"{bytes_per_second / 1e3:.2f} kB/s"


def format_seconds(seconds: float) -> str:
    """`seconds` for people: `"850 ms"`, `"3.42 s"`, `"2 min 05 s"`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 119.5:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
