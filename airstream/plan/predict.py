"""This makes seconds of bytes: what a pass over all layers is going to take, and which link it waits for.

It knows what one pass moves and multiplies (`Traffic`) and what the machine can do (`HardwareFacts`); divides the one
by the other. It refuses to know plans, configs and devices, and measures nothing. docs/machine.md states the model,
with its limits; where it meets the cost model of FlexGen (Sheng et al. 2023, section 4.3), its terms stand beside ours:

    T      = T_pre * l + T_gen * (n - 1) * l                     `Prediction.generate_seconds`
    T_gen  = max(ctog, gtoc, dtoc, ctod, comp) of one layer      `decode_seconds` = T_gen * l
    dtoc, ctog                                                   disk to host ("disk"), host to device ("H2D")
    gtoc, ctod                                                   0: nothing is written back
    comp                                                         "memory bandwidth" + "compute"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from airstream.errors import ArgumentError
from airstream.plan.step import Step
from airstream.rates.facts import HardwareFacts, Rate
from airstream.reporting.probe import DISK, H2D, HOST_COPY

MEMORY, COMPUTE = "memory bandwidth", "compute"
"""The links that are not between two memories; a profile measures the others under the names that they have here."""

LINK_OF_RATE = {"disk": DISK, "host_copy": HOST_COPY, "h2d": H2D, "h2d_pageable": H2D}
"""Fields of `HardwareFacts`, and the link that each is a rate of."""

PACKED = "packed"
"""What is made dense where it is, and moves over none of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one pass over all layers moves and multiplies: of one model, under one plan.

    Attributes:
        dtype: the dtype of the computation, "bfloat16"; `item_bytes` are those of one weight, as it lies in memory.
        on_cpu: the CPU computes; then reading and copying take time from it.
        num_layers: the layers that one pass calls.
        weight_bytes: the bytes of all weights that are multiplied with, resident or not, without embedding rows.
        head_bytes: those of them that are the lm_head, which sees the positions that are kept.
        expert_bytes: those of them that are routed experts; one token is routed to `expert_share` of those.
        kv_bytes_per_token: keys and values of one token of one sequence, all layers together.
        attention_width: heads times their width: of the queries of one token in one layer.
        disk_bytes: read from disk in every pass.
        first_disk_bytes: read from disk in the first pass, which also fills what stays resident.
        decoding_seconds_per_byte: what a CPU core takes for a byte from disk or page cache, where weights are packed.
        decoding_traffic_per_byte: the bytes of its memory that an accelerator passes over to decode one that crosses.
        product_seconds_per_byte: what a CPU core takes to multiply with a byte of weights that stay packed.
        packed_bytes: those that stay packed, and are made dense in every pass: `made_bytes` in the ring.
        cached_bytes: read out of the page cache in every pass, not from disk.
        h2d_bytes, h2d_pageable_bytes: the bytes that cross to the accelerator in every pass, from pinned memory and
            from other. A plan has none of the latter: what could not be pinned crosses by way of pinned buffers.
        first_h2d_bytes: the bytes that cross from pinned memory in the first pass.
        reads_ahead: the next layers move while one is computed.
    """

    dtype: str
    item_bytes: float
    on_cpu: bool
    num_layers: int
    weight_bytes: int
    head_bytes: int = 0
    expert_bytes: int = 0
    expert_share: float = 1.0
    kv_bytes_per_token: int
    attention_width: int
    disk_bytes: int
    first_disk_bytes: int
    decoding_seconds_per_byte: float = 0.0
    decoding_traffic_per_byte: float = 0.0
    product_seconds_per_byte: float = 0.0
    packed_bytes: int = 0
    made_bytes: int = 0
    cached_bytes: int = 0
    h2d_bytes: int = 0
    h2d_pageable_bytes: int = 0
    first_h2d_bytes: int = 0
    reads_ahead: bool = True

    def touched_bytes(self, tokens: int) -> float:
        """Weights that `tokens` tokens multiply with, all together: of the experts, those one of them is routed to.

        Expected, if every token draws its experts on its own: B tokens find 1 - (1 - share)^B of them.
        """
        return self.weight_bytes - self.expert_bytes * (1 - self.expert_share) ** tokens

    def flops(self, step: Step, context: int) -> float:
        """Floating-point operations of a step: two per weight and token, four per query element and token attended to.

        Every layer is taken to attend to the whole context: for sliding windows that is too many.
        """
        idle_bytes = self.expert_bytes * (1 - self.expert_share)
        elements = (self.weight_bytes - self.head_bytes - idle_bytes) * step.tokens + self.head_bytes * step.kept
        attention = 4 * self.num_layers * self.attention_width * step.tokens * context
        return step.sequences * (2 * elements / self.item_bytes + attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How long generation is going to take. JSON-able through `asdict`; `from_dict` is its inverse.

    Attributes:
        batch_size, prompt_tokens, context: sequences, tokens of each prompt, tokens in the KV cache while decoding.
        decode_seconds: the seconds of one step: one token for every sequence.
        prefill_seconds: the seconds of the first call's pass over the prompt: all weights come from disk.
        warm_prefill_seconds: the seconds of the same pass in later calls, when what stays resident is resident.
        bottleneck: the link that `decode_seconds` waits for; `prefill_bottleneck` that of `prefill_seconds`.
        links: seconds that a decode step keeps each link busy. "disk", "host copy" and "H2D" overlap with each other
            and with the sum of "memory bandwidth" (weights and keys and values are read) and "compute" (all else). Of
            the time for reading weights and that for multiplying, only the longer one counts. Where the CPU computes,
            "host copy" belongs to the sum.
        rates: the rates that were used, by their field in `HardwareFacts`.
    """

    batch_size: int
    prompt_tokens: int
    context: int
    decode_seconds: float
    prefill_seconds: float
    warm_prefill_seconds: float
    bottleneck: str
    prefill_bottleneck: str
    links: Mapping[str, float]
    rates: Mapping[str, Rate]

    @property
    def tokens_per_second(self) -> float:
        """While decoding, all sequences together."""
        return self.batch_size / self.decode_seconds

    @property
    def assumed(self) -> tuple[str, ...]:
        """The rates among `rates` that were not measured on this machine."""
        return tuple(name for name, rate in self.rates.items() if not rate.is_measured)

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said about how the rates were measured."""
        return tuple(dict.fromkeys(note for rate in self.rates.values() for note in rate.notes))

    def generate_seconds(self, new_tokens: int) -> float:
        """Seconds of a first call that generates `new_tokens` tokens per sequence: T_pre * l + T_gen * (n - 1) * l."""
        return self.prefill_seconds + (new_tokens - 1) * self.decode_seconds

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Prediction:
        """The prediction that `asdict` made `data` of."""
        return cls(**{**data, "rates": {name: Rate(**rate) for name, rate in data["rates"].items()}})


def predict(traffic: Traffic, hardware: HardwareFacts, batch_size: int, prompt_tokens: int, context: int) -> Prediction:
    """What `traffic` takes on `hardware`.

    Args:
        batch_size: sequences that are generated at once.
        prompt_tokens: of each sequence, in one pass.
        context: tokens of each sequence in the KV cache during the decode step that is asked for; for the mean over a
            generation of n tokens, the prompt's and n / 2 more.

    Raises:
        ArgumentError: bytes cross a link that `hardware` has no rate for.
    """
    warm = {
        "disk": traffic.disk_bytes,
        "host_copy": traffic.cached_bytes,
        "h2d": traffic.h2d_bytes,
        "h2d_pageable": traffic.h2d_pageable_bytes,
        PACKED: traffic.packed_bytes,
    }
    first = warm | {"disk": traffic.first_disk_bytes, "host_copy": 0, "h2d": traffic.first_h2d_bytes, PACKED: 0}
    prompt = Step(batch_size, prompt_tokens, kept=1, accepted=1)
    decode = _links(traffic, hardware, warm, Step(batch_size, 1, kept=1, accepted=1), context)
    prefill = _links(traffic, hardware, first, prompt, prompt_tokens)
    warm_prefill = _links(traffic, hardware, warm, prompt, prompt_tokens)
    return Prediction(
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        context=context,
        decode_seconds=_seconds(traffic, hardware, decode),
        prefill_seconds=_seconds(traffic, hardware, prefill),
        warm_prefill_seconds=_seconds(traffic, hardware, warm_prefill),
        bottleneck=_bottleneck(traffic, decode),
        prefill_bottleneck=_bottleneck(traffic, prefill),
        links=decode,
        rates=_rates(traffic, hardware, [name for name in LINK_OF_RATE if warm[name] or first[name]]),
    )


def _links(
    traffic: Traffic, hardware: HardwareFacts, moved: Mapping[str, int], step: Step, context: int
) -> dict[str, float]:
    """Seconds that a step keeps each link busy."""
    seconds = dict.fromkeys((DISK, HOST_COPY, H2D, MEMORY, COMPUTE), 0.0)
    for name, nbytes in moved.items():
        if nbytes and name in LINK_OF_RATE:
            seconds[LINK_OF_RATE[name]] += nbytes / _rate(hardware, name).per_second
    bandwidth = hardware.weights_rate(traffic.dtype).per_second
    touched = traffic.touched_bytes(step.sequences * step.tokens)
    reading = max(touched / bandwidth, touched * traffic.product_seconds_per_byte / hardware.num_cores)
    multiplying = traffic.flops(step, context) / hardware.flops_rate(traffic.dtype).per_second
    seconds[MEMORY if reading >= multiplying else COMPUTE] += max(reading, multiplying)
    seconds[MEMORY] += step.sequences * context * traffic.kv_bytes_per_token / bandwidth
    seconds[COMPUTE] += traffic.num_layers * hardware.layer_seconds
    if traffic.on_cpu and traffic.reads_ahead:  # else the CPU has nothing better to do while it reads
        seconds[COMPUTE] += moved["disk"] * hardware.disk_cpu_seconds_per_byte / hardware.num_cores
    if traffic.on_cpu:
        packed = moved["disk"] + moved["host_copy"] + moved[PACKED]
        seconds[COMPUTE] += packed * traffic.decoding_seconds_per_byte / hardware.num_cores
    else:  # while the next bytes cross, but in the memory that weights are multiplied from
        packed = moved["h2d"] + moved["h2d_pageable"]
        seconds[MEMORY] += (packed * traffic.decoding_traffic_per_byte + traffic.made_bytes) / bandwidth
    return seconds


def _seconds(traffic: Traffic, hardware: HardwareFacts, links: Mapping[str, float]) -> float:
    moving, working = _sides(traffic, links)
    work = sum(working.values())
    if not traffic.reads_ahead:
        return max(moving.values()) + work
    if not traffic.on_cpu:
        return max(*moving.values(), work)
    disk_share, computing_share = hardware.disk_share_while_computing, hardware.computing_share_while_reading
    both = min(moving[DISK] / disk_share, work / computing_share)  # the time in which the CPU and the disk are busy
    return both + (moving[DISK] - both * disk_share) + (work - both * computing_share)


def _bottleneck(traffic: Traffic, links: Mapping[str, float]) -> str:
    moving, working = _sides(traffic, links)
    slower = moving if max(moving.values()) > sum(working.values()) else working
    return max(slower, key=lambda name: slower[name])


def _sides(traffic: Traffic, links: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The links that overlap, and those whose times add up because one processor does them all."""
    busy = (MEMORY, COMPUTE, HOST_COPY) if traffic.on_cpu else (MEMORY, COMPUTE)
    return {name: links[name] for name in links if name not in busy}, {name: links[name] for name in busy}


def _rates(traffic: Traffic, hardware: HardwareFacts, crossed: list[str]) -> dict[str, Rate]:
    arithmetic = {"weights": hardware.weights_rate(traffic.dtype), "flops": hardware.flops_rate(traffic.dtype)}
    return {name: _rate(hardware, name) for name in crossed} | arithmetic


def _rate(hardware: HardwareFacts, name: str) -> Rate:
    rate: Rate | None = getattr(hardware, name)
    if rate is None:
        raise ArgumentError(
            f"weights cross to an accelerator, but the rates of {hardware.machine} have no {name!r}: "
            "they were measured for another computing device"
        )
    return rate
