"""Hardware facts are the rates of one machine, and where each number comes from.

It knows numbers and their sources, and what to assume where nothing was measured. It refuses to know how they are
measured, which model they are for, and torch.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from airstream.errors import ArgumentError

__all__ = ["DTYPES", "HardwareFacts", "Rate", "assumed", "measured_today"]

DTYPES = ("bfloat16", "float16", "float32")
"""The dtypes, named as in `torch.<name>`, whose arithmetic is measured."""

_ALIKE = {"bfloat16": "float16", "float16": "bfloat16"}
"""The dtype that computes most like another one: as wide, and on the same units of most devices."""

MAX_SECONDS = 86_400
"""What no single layer takes: a day."""

LINKS: Mapping[str, str] = {
    "h2d": "host to device, pinned",
    "h2d_pageable": "host to device, pageable",
    "d2h": "device to host, pinned",
    "d2h_pageable": "device to host, pageable",
}
"""The fields of `HardwareFacts` that only an accelerator has, and what they are called in print."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So much per second.

    Attributes:
        per_second: bytes or floating-point operations per second; more than 0.
        source: where the number comes from: "measured 2026-11-25", "assumed: NVMe on PCIe 3", "given",
            "data sheet: RTX 3090".

    Raises:
        ArgumentError: `per_second` is not a positive, finite number.
    """

    per_second: float
    source: str

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise ArgumentError(f"where a rate comes from is said in words, not by a {type(self.source).__name__}")
        if not 0 < self.per_second < math.inf:
            raise ArgumentError(f"a rate of {self.per_second!r} per second ({self.source}) is not a positive number")

    @property
    def is_measured(self) -> bool:
        """Whether the number was measured on this machine."""
        return self.source.startswith("measured")

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said about a measured rate besides its date: "while other programs used 1.3 cores"."""
        return tuple(self.source.split("; ")[1:]) if self.is_measured else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareFacts:
    """What a machine can do, one kind of work at a time. Printable; `to_json` and `from_json` are inverse.

    Attributes:
        machine: the processor, cores, memory and computing device, for people. No host name: that is private.
        num_cores: CPU cores that the process may use.
        disk: bytes per second from files to host memory, around the page cache, with the engine's own reader.
        disk_cpu_seconds_per_byte: CPU time of this process that reading one byte costs. 0 if it is not known.
        host_copy: bytes per second that are copied from one place in host memory to another.
        h2d, d2h: bytes per second from host memory to the device and back, through pinned memory; None where the CPU
            computes.
        h2d_pageable, d2h_pageable: the same through memory that is not pinned.
        weights: by dtype, bytes of weights per second that the device gets through in products with one vector.
        flops: by dtype, floating-point operations per second in large matrix products on the device.
        layer_seconds: what a layer of a decode step takes however small its weights are: Python, small kernels.
        disk_share_while_computing: what is left of `disk` while the CPU computes: 1 if all of it is, or not known.
        computing_share_while_reading: what is left of `weights` and `flops` meanwhile, if they are the CPU's.

    Raises:
        ArgumentError: no dtype has a rate, or a time is none that anybody waits for.
    """

    machine: str
    num_cores: int
    disk: Rate
    disk_cpu_seconds_per_byte: float = 0.0
    host_copy: Rate
    h2d: Rate | None = None
    h2d_pageable: Rate | None = None
    d2h: Rate | None = None
    d2h_pageable: Rate | None = None
    weights: Mapping[str, Rate]
    flops: Mapping[str, Rate]
    layer_seconds: float
    disk_share_while_computing: float = 1.0
    computing_share_while_reading: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.machine, str) or type(self.num_cores) is not int or self.num_cores < 1:
            raise ArgumentError("a machine has a name and one core at least")
        if not self.weights or not self.flops:
            raise ArgumentError("weights and flops need the rate of one dtype at least")
        for name in ("layer_seconds", "disk_cpu_seconds_per_byte"):
            if not 0 <= getattr(self, name) < MAX_SECONDS:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}, not from 0 to {MAX_SECONDS:,} seconds")

        for name in ("disk_share_while_computing", "computing_share_while_reading"):
            if not 0 < getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}, not a share")

    def weights_rate(self, dtype: str) -> Rate:
        """The rate in `weights` of `dtype`, "bfloat16" or "torch.bfloat16".

        One that was not measured goes by the dtype that is most like it, or else by the slowest; `source` says so.
        """
        return _rate_of(self.weights, dtype)

    def flops_rate(self, dtype: str) -> Rate:
        """The rate in `flops` of `dtype`, as `weights_rate`."""
        return _rate_of(self.flops, dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HardwareFacts:
        """The facts that `to_dict` made `data` of.

        Raises:
            ArgumentError, KeyError, TypeError: it is something else.
        """
        rates = {name: Rate(**data[name]) for name in ("disk", "host_copy")}
        links = {name: None if data[name] is None else Rate(**data[name]) for name in LINKS}
        by_dtype = {
            name: {dtype: Rate(**rate) for dtype, rate in dict(data[name]).items()} for name in ("weights", "flops")
        }
        return cls(**{**data, **rates, **links, **by_dtype})

    def to_json(self) -> str:
        """What `to_dict` gives, as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> HardwareFacts:
        """The facts that `to_json` has written as `text`.

        Raises:
            ArgumentError, KeyError, TypeError, json.JSONDecodeError: it is something else.
        """
        return cls.from_dict(json.loads(text))

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def measured_today() -> str:
    """The source of a rate that has just been measured."""
    return f"measured {datetime.date.today().isoformat()}"


def assumed(device_type: str, machine: str = "a machine nobody has measured", num_cores: int = 0) -> HardwareFacts:
    """Planning numbers for a common machine; every `source` says that they are assumed, and of what.

    Args:
        device_type: of the device that computes: "cpu", or any other for an accelerator.
        num_cores: 0 for those of this machine.
    """
    on_host = device_type == "cpu"
    pinned, pageable = Rate(25e9, "assumed: PCIe 4 x16"), Rate(8.3e9, "assumed: a third of pinned")
    links = dict.fromkeys(LINKS) if on_host else dict(zip(LINKS, (pinned, pageable) * 2, strict=True))
    return HardwareFacts(
        machine=machine,
        num_cores=num_cores or os.cpu_count() or 1,
        disk=Rate(3.3e9, "assumed: NVMe on PCIe 3"),
        disk_cpu_seconds_per_byte=3e-11,  # 3 ms for a layer of 100 MB
        host_copy=Rate(10e9, "assumed: two channels of DDR4"),
        weights=_alike(15e9, "assumed: two channels of DDR4") if on_host else _alike(270e9, "assumed: a mid-range GPU"),
        flops=_cpu_flops() if on_host else _alike(15e12, "assumed: a mid-range GPU"),
        layer_seconds=0.0005 if on_host else 0.0008,
        **links,
    )


def _cpu_flops() -> dict[str, Rate]:
    """Few desktop CPUs have units for 16 bits: they convert, which takes most of the time."""
    return _alike(20e9, "assumed: a CPU without 16-bit units") | {"float32": Rate(100e9, "assumed: a desktop CPU")}


def _alike(per_second: float, source: str) -> dict[str, Rate]:
    return dict.fromkeys(DTYPES, Rate(per_second, source))


def _rate_of(rates: Mapping[str, Rate], dtype: str) -> Rate:
    name = str(dtype).removeprefix("torch.")
    if name in rates:
        return rates[name]
    stand_in = _ALIKE.get(name, "")
    if stand_in not in rates:
        stand_in = min(rates, key=lambda other: rates[other].per_second)
    return Rate(rates[stand_in].per_second, f"assumed: as {stand_in}, {rates[stand_in].source}")


def _lines(facts: HardwareFacts) -> Iterator[str]:
    """The table that people read."""
    yield facts.machine
    yield _row("disk", _bytes(facts.disk), facts.disk.source)
    if facts.disk_cpu_seconds_per_byte:
        yield _row("CPU time of reading", f"{facts.disk_cpu_seconds_per_byte * 1e9:.3f} s/GB", "")
    yield _row("host copy", _bytes(facts.host_copy), facts.host_copy.source)
    for name, label in LINKS.items():
        if (rate := getattr(facts, name)) is not None:
            yield _row(label, _bytes(rate), rate.source)
    for dtype, rate in facts.weights.items():
        yield _row(f"weights, {dtype}", _bytes(rate), rate.source)
    for dtype, rate in facts.flops.items():
        yield _row(f"products, {dtype}", _flops(rate), rate.source)
    if min(facts.disk_share_while_computing, facts.computing_share_while_reading) < 1:
        yield _row("disk while computing", f"{facts.disk_share_while_computing:.0%}", "of its rate")
        yield _row("computing while reading", f"{facts.computing_share_while_reading:.0%}", "of its rate")
    yield _row("every layer besides", f"{_three_digits(facts.layer_seconds * 1000)} ms", "")


def _row(label: str, value: str, source: str) -> str:
    return f"  {label:<26}{value:>14}  {source}".rstrip()


def _bytes(rate: Rate) -> str:
    return f"{_three_digits(rate.per_second / 1e9)} GB/s"


def _flops(rate: Rate) -> str:
    unit, size = ("TFLOP/s", 1e12) if rate.per_second >= 1e12 else ("GFLOP/s", 1e9)
    return f"{_three_digits(rate.per_second / size)} {unit}"


def _three_digits(value: float) -> str:
    """Three digits that mean something, and never an exponent: `"0.0174"`, `"2.17"`, `"936"`."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(0, decimals)}f}"
