"""Predictions: what others have published and what was measured here comes out, and more is never slower."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airstream.errors import ArgumentError
from airstream.plan.predict import COMPUTE, MEMORY, Prediction, Traffic, predict
from airstream.plan.step import Step
from airstream.rates.facts import HardwareFacts, Rate
from airstream.reporting.probe import DISK, H2D, HOST_COPY
from airstream.reporting.units import GIB

BENCHMARKS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
RATES = ("disk", "host_copy", "h2d", "h2d_pageable")
OVERLAPPING = (DISK, HOST_COPY, H2D)
ENDLESS = 1e30


def rate(per_second: float, source: str = "measured 2026-01-01") -> Rate:
    return Rate(per_second, source)


def machine(**changes: Any) -> HardwareFacts:
    """A desktop with a graphics card, unless something else is said; arithmetic may be given as one number."""
    rates = {"disk": 7e9, "host_copy": 20e9, "h2d": 25e9, "h2d_pageable": 10e9, "weights": 500e9, "flops": 50e12}
    rates |= {name: value for name, value in changes.items() if name in rates}
    links: dict[str, Any] = {name: rate(rates[name]) for name in RATES}
    arithmetic = {name: {"bfloat16": rate(rates[name])} for name in ("weights", "flops")}
    other = {name: value for name, value in changes.items() if name not in rates}
    return HardwareFacts(machine="a desktop", **{"num_cores": 8, "layer_seconds": 1e-4} | links | arithmetic | other)


ONLY_LINKS = machine(weights=ENDLESS, flops=ENDLESS, layer_seconds=0.0)
"""A machine on which nothing but moving weights takes time."""


def traffic(**changes: Any) -> Traffic:
    """A LLaMA-7B in bfloat16, a third of it streamed from disk to an accelerator, a third from its host's memory."""
    third = 4_300_000_000
    return Traffic(
        **{
            "dtype": "bfloat16",
            "item_bytes": 2,
            "on_cpu": False,
            "num_layers": 32,
            "weight_bytes": 3 * third,
            "head_bytes": 262_144_000,
            "kv_bytes_per_token": 524_288,
            "attention_width": 4096,
            "disk_bytes": third,
            "first_disk_bytes": 3 * third,
            "h2d_bytes": 2 * third,
            "first_h2d_bytes": 3 * third,
        }
        | changes
    )


def decode_seconds(moved: Traffic, hardware: HardwareFacts, batch_size: int = 1, context: int = 0) -> float:
    return predict(moved, hardware, batch_size, 1, context).decode_seconds


# ------------------------------------------------------------------------------------------------------ published cases


def test_80_layers_of_1_6_gb_cross_a_pageable_bus_of_13_3_gb_per_second_in_9_7_seconds() -> None:
    """Reported of a 70B model in fp16 streamed from host memory. 80 * 1.6 / 13.3 = 9.62, which it rounds up."""
    nbytes = 80 * 1_600_000_000
    moved = traffic(num_layers=80, weight_bytes=nbytes, disk_bytes=0, h2d_bytes=0, h2d_pageable_bytes=nbytes)
    prediction = predict(moved, machine(h2d_pageable=13.3e9), 1, 1, 0)
    assert prediction.decode_seconds == pytest.approx(9.7, abs=0.1)
    assert prediction.bottleneck == H2D


@pytest.mark.parametrize("batch_size", [1, 64, 1024])
def test_a_decode_step_is_flexgens_t_gen_times_its_layers(batch_size: int) -> None:
    """OPT-175B on the T4 and with the constants of FlexGen's cost model; KV cache on the GPU, weights in host memory.

    T_gen = max(ctog, comp), ctog = (8 h1^2 + 4 h1 h2) / ctog_bdw, and
    comp = b (8 h1^2 + 4 h1 h2) / mm_flops + 4 b (s + n/2) h1 / bmm_flops, with one rate for both products here.
    """
    num_layers, h1, h2, s, n = 96, 12288, 49152, 512, 32
    weights, ctog_bdw, mm_flops = 8 * h1**2 + 4 * h1 * h2, 12.89 * GIB, 4.3e12
    ctog = weights / ctog_bdw
    comp = batch_size * (weights + 4 * (s + n / 2) * h1) / mm_flops
    moved = traffic(
        num_layers=num_layers,
        weight_bytes=num_layers * weights,
        head_bytes=0,
        attention_width=h1,
        kv_bytes_per_token=0,
        disk_bytes=0,
        h2d_bytes=num_layers * weights,
    )
    hardware = machine(h2d=ctog_bdw, weights=ENDLESS, flops=mm_flops, layer_seconds=0.0)
    prediction = predict(moved, hardware, batch_size, s, s + n // 2)
    assert prediction.decode_seconds == pytest.approx(num_layers * max(ctog, comp))
    assert prediction.bottleneck == (H2D if ctog > comp else COMPUTE)


def test_llama_cpp_decodes_6_gb_of_resident_weights_at_40_gb_per_second_in_0_15_seconds() -> None:
    """Measured on two cores, with everything in memory."""
    moved = traffic(on_cpu=True, weight_bytes=6_030_000_000, disk_bytes=0, h2d_bytes=0, first_h2d_bytes=0)
    prediction = predict(moved, machine(weights=40e9, layer_seconds=0.0), 1, 1, 40)
    assert prediction.decode_seconds == pytest.approx(0.15, abs=0.005)
    assert prediction.bottleneck == MEMORY


def test_the_streamed_benchmark_decodes_in_what_is_predicted() -> None:
    """docs/benchmarks/w6-stream.json: every turn, with the rate of the raw link that was measured in it."""
    report = json.loads((BENCHMARKS / "w6-stream.json").read_text())
    for turn in report["turns"]:
        prediction = predict(streamed_benchmark(turn["plan"]), two_cores(turn), 1, 32, 32 + 8 // 2)
        assert prediction.decode_seconds == pytest.approx(turn["decode_seconds_per_token"], rel=0.05)
        assert prediction.bottleneck == prediction.prefill_bottleneck == DISK


def test_the_first_token_of_the_streamed_benchmark_takes_little_more_than_is_predicted() -> None:
    """A single pass, in which torch also does much for the first time, which is in no rate: at most a fourth more."""
    report = json.loads((BENCHMARKS / "w6-stream.json").read_text())
    moved = streamed_benchmark(report["turns"][0]["plan"])
    predicted = predict(moved, two_cores(report["median"]), 1, 32, 32).prefill_seconds
    assert predicted < report["median"]["ttft_seconds"] < 1.25 * predicted


def streamed_benchmark(plan: dict[str, Any]) -> Traffic:
    """28 layers streamed to the CPU, the head resident, as the recorded plan has it."""
    streamed = sum(batch["nbytes"] for batch in plan["batches"])
    head = plan["tiers"]["cpu"]["items"]["resident weights"]
    return traffic(
        on_cpu=True,
        num_layers=28,
        weight_bytes=streamed + head,
        head_bytes=head,
        kv_bytes_per_token=2 * 28 * 8 * 128 * 2,
        attention_width=24 * 128,
        disk_bytes=streamed,
        first_disk_bytes=streamed + head,
        h2d_bytes=0,
        first_h2d_bytes=0,
    )


def two_cores(measured: dict[str, Any]) -> HardwareFacts:
    """The machine of that benchmark: its link as measured, and 13 GB/s of bfloat16 weights, 10 ms a layer of 86 MB."""
    disk = measured["link_gb_per_second"] * 1e9
    return machine(disk=disk, weights=13e9, flops=500e9, num_cores=2, disk_cpu_seconds_per_byte=1.2e-10)


# -------------------------------------------------------------------------------------------- what every one must keep


def sizes(smallest: int = 0) -> st.SearchStrategy[int]:
    return st.integers(smallest, 10**12)


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    """Of any model, under any plan."""
    on_cpu = draw(st.booleans())
    weights, disk, cached = draw(sizes(1)), draw(sizes()), draw(sizes())
    h2d, pageable = (0, 0) if on_cpu else (draw(sizes()), draw(sizes()))
    head = draw(st.integers(0, weights))
    return Traffic(
        dtype="bfloat16",
        item_bytes=2,
        on_cpu=on_cpu,
        num_layers=draw(st.integers(1, 200)),
        weight_bytes=weights,
        head_bytes=head,
        expert_bytes=draw(st.integers(0, weights - head)),
        expert_share=draw(st.floats(0.01, 1)),
        kv_bytes_per_token=draw(st.integers(0, 10**7)),
        attention_width=draw(st.integers(1, 20_000)),
        disk_bytes=disk,
        first_disk_bytes=disk + cached + draw(sizes()),
        cached_bytes=cached,
        h2d_bytes=h2d,
        h2d_pageable_bytes=pageable,
        first_h2d_bytes=h2d if on_cpu else h2d + draw(sizes()),
        decoding_traffic_per_byte=0.0 if on_cpu else draw(st.floats(0, 100)),
        reads_ahead=draw(st.booleans()),
    )


@st.composite
def machines(draw: st.DrawFn) -> HardwareFacts:
    bandwidths = {name: draw(st.floats(1e8, 1e11)) for name in RATES}
    return machine(
        **bandwidths,
        weights=draw(st.floats(1e9, 1e13)),
        flops=draw(st.floats(1e10, 1e15)),
        num_cores=draw(st.integers(1, 64)),
        layer_seconds=draw(st.floats(0, 0.01)),
        disk_cpu_seconds_per_byte=draw(st.floats(0, 1e-9)),
        disk_share_while_computing=draw(st.floats(0.5, 1)),
        computing_share_while_reading=draw(st.floats(0.5, 1)),
    )


def times(prediction: Prediction) -> tuple[float, float, float]:
    return prediction.decode_seconds, prediction.prefill_seconds, prediction.warm_prefill_seconds


def no_slower(faster: Prediction, slower: Prediction) -> bool:
    return all(a <= b * (1 + 1e-9) for a, b in zip(times(faster), times(slower), strict=True))


WORK = {"batch_size": st.integers(1, 256), "prompt_tokens": st.integers(1, 4096), "context": st.integers(0, 8192)}
"""What a prediction is asked for."""


@settings(max_examples=150, deadline=None)
@given(moved=traffics(), hardware=machines(), factor=st.floats(1, 100), **WORK)
def test_a_faster_machine_is_never_slower(moved: Traffic, hardware: HardwareFacts, factor: float, **work: int) -> None:
    before = predict(moved, hardware, **work)
    for name in RATES:
        quicker = replace(hardware, **{name: rate(getattr(hardware, name).per_second * factor)})
        assert no_slower(predict(moved, quicker, **work), before)
    for name in ("weights", "flops"):
        quicker = replace(
            hardware, **{name: {"bfloat16": rate(getattr(hardware, name)["bfloat16"].per_second * factor)}}
        )
        assert no_slower(predict(moved, quicker, **work), before)
    assert no_slower(predict(moved, replace(hardware, num_cores=2 * hardware.num_cores), **work), before)


@settings(max_examples=150, deadline=None)
@given(moved=traffics(), hardware=machines(), more=sizes(1), **WORK)
def test_less_to_move_or_to_multiply_is_never_slower(
    moved: Traffic, hardware: HardwareFacts, more: int, **work: int
) -> None:
    before = predict(moved, hardware, **work)
    names = ["weight_bytes", "disk_bytes", "first_disk_bytes", "cached_bytes", "kv_bytes_per_token", "num_layers"]
    names += [] if moved.on_cpu else ["h2d_bytes", "h2d_pageable_bytes", "first_h2d_bytes"]
    for name in names:
        assert no_slower(before, predict(replace(moved, **{name: getattr(moved, name) + more}), hardware, **work)), name
    for name in work:
        assert no_slower(before, predict(moved, hardware, **work | {name: work[name] + 1})), name
    assert no_slower(predict(replace(moved, expert_share=0.0), hardware, **work), before)


@settings(max_examples=150, deadline=None)
@given(moved=traffics(), hardware=machines(), **WORK)
def test_a_larger_batch_never_gives_fewer_tokens_per_second(
    moved: Traffic, hardware: HardwareFacts, **work: int
) -> None:
    larger = work | {"batch_size": work["batch_size"] + 1}
    before, after = predict(moved, hardware, **work), predict(moved, hardware, **larger)
    assert after.tokens_per_second >= before.tokens_per_second * (1 - 1e-9)


@settings(max_examples=150, deadline=None)
@given(moved=traffics(), hardware=machines(), **WORK)
def test_the_links_add_up_and_the_bottleneck_is_the_busiest(
    moved: Traffic, hardware: HardwareFacts, **work: int
) -> None:
    prediction = predict(moved, hardware, **work)
    busy = {MEMORY, COMPUTE} | ({HOST_COPY} if moved.on_cpu else set())
    working = sum(prediction.links[name] for name in busy)
    moving = max(prediction.links[name] for name in OVERLAPPING if name not in busy)
    expected = max(working, moving) if moved.reads_ahead else working + moving
    if moved.reads_ahead and moved.on_cpu:
        disk, computing = hardware.disk_share_while_computing, hardware.computing_share_while_reading
        expected = max(moving + working * (1 - disk) / computing, working + moving * (1 - computing) / disk)
    assert prediction.decode_seconds == pytest.approx(expected)
    side = busy if working >= moving else set(OVERLAPPING) - busy
    assert prediction.bottleneck in side
    assert prediction.links[prediction.bottleneck] == max(prediction.links[name] for name in side)
    if not moved.reads_ahead:
        assert prediction.decode_seconds >= max(prediction.links.values())


@settings(max_examples=50, deadline=None)
@given(moved=traffics(), hardware=machines(), **WORK)
def test_a_prediction_survives_json(moved: Traffic, hardware: HardwareFacts, **work: int) -> None:
    prediction = predict(moved, hardware, **work)
    assert Prediction.from_dict(json.loads(json.dumps(asdict(prediction)))) == prediction


@pytest.mark.parametrize(("disk_seconds", "expected"), [(0.0, 1.0), (0.5, 1.25), (1.0, 5 / 3), (2.0, 8 / 3)])
def test_who_computes_and_reads_does_both_at_their_shares(disk_seconds: float, expected: float) -> None:
    """A second of products takes 4/3 while the disk is read, of which half as much comes meanwhile."""
    hardware = machine(
        disk=1e9,
        weights=1e9,
        flops=ENDLESS,
        layer_seconds=0.0,
        disk_share_while_computing=0.5,
        computing_share_while_reading=0.75,
    )
    moved = traffic(
        on_cpu=True,
        weight_bytes=10**9,
        head_bytes=0,
        kv_bytes_per_token=0,
        disk_bytes=int(disk_seconds * 1e9),
        h2d_bytes=0,
        first_h2d_bytes=0,
    )
    assert predict(moved, hardware, 1, 1, 0).decode_seconds == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------------- one at a time


@pytest.mark.parametrize(
    ("slow", "bottleneck"),
    [
        ({"disk": 1e8}, DISK),
        ({"h2d": 1e8}, H2D),
        ({"host_copy": 1e7}, HOST_COPY),
        ({"weights": 1e8}, MEMORY),
        ({"flops": 1e9}, COMPUTE),
        ({"layer_seconds": 10.0}, COMPUTE),
    ],
)
def test_the_slow_part_is_named(slow: dict[str, float], bottleneck: str) -> None:
    prediction = predict(traffic(cached_bytes=10**9), machine(**slow), 1, 1, 0)
    assert prediction.bottleneck == bottleneck
    quicker = machine(**{name: 1.1 * value if name != "layer_seconds" else value / 1.1 for name, value in slow.items()})
    assert predict(traffic(cached_bytes=10**9), quicker, 1, 1, 0).decode_seconds < prediction.decode_seconds


def test_a_batch_is_free_until_multiplying_takes_longer_than_reading_weights() -> None:
    """1 TFLOP/s and 10 GB/s balance at 100 FLOP a byte: 100 tokens with 2 FLOP for each weight of 2 bytes."""
    resident = traffic(disk_bytes=0, h2d_bytes=0, head_bytes=0, kv_bytes_per_token=0)
    hardware = machine(weights=10e9, flops=1e12, layer_seconds=0.0)
    single, ridge, double = (decode_seconds(resident, hardware, batch) for batch in (1, 100, 200))
    assert single == pytest.approx(1.29)
    assert ridge == pytest.approx(single)
    assert double == pytest.approx(2 * single)


def test_keys_and_values_are_read_for_every_sequence() -> None:
    hardware = machine(weights=10e9, layer_seconds=0.0)
    resident = traffic(disk_bytes=0, h2d_bytes=0)
    with_context, without = decode_seconds(resident, hardware, 4, 1000), decode_seconds(resident, hardware, 4)
    assert with_context - without == pytest.approx(4 * 1000 * 524_288 / 10e9)


def test_of_the_experts_only_those_that_are_routed_to_are_read_and_multiplied() -> None:
    """8 experts, 2 for each token: one token reads a fourth; many read all, and each multiplies with a fourth."""
    experts = traffic(weight_bytes=10_000, head_bytes=0, expert_bytes=8_000, expert_share=2 / 8, attention_width=0)
    assert [experts.touched_bytes(tokens) for tokens in (1, 2, 1000)] == pytest.approx([4_000, 5_500, 10_000])
    assert experts.flops(Step(1, 1, 1, 1), 0) == 4_000
    assert experts.flops(Step(3, 100, 1, 1), 0) == 3 * 100 * 4_000


def test_the_head_sees_one_position_of_each_prompt() -> None:
    moved = traffic(weight_bytes=10_000, head_bytes=2_000, attention_width=0)
    assert moved.flops(Step(1, 1, 1, 1), 0) == 10_000
    assert moved.flops(Step(2, 100, 1, 1), 0) == 2 * (100 * 8_000 + 2_000)


def test_attention_multiplies_every_query_with_every_key_and_value() -> None:
    moved = traffic(weight_bytes=0, head_bytes=0, num_layers=3, attention_width=64)
    assert moved.flops(Step(2, 10, 1, 1), 30) == 2 * 3 * (4 * 64 * 10 * 30)


def test_reading_costs_the_cpu_its_time_where_it_computes() -> None:
    """6 GB at 0.12 s a GB on two cores: 0.36 s that cannot be computed in; the rest of the step is 1 s of weights."""
    shape = {"weight_bytes": 10**10, "disk_bytes": 6 * 10**9, "h2d_bytes": 0, "first_h2d_bytes": 0}
    hardware = machine(disk=ENDLESS, weights=1e10, num_cores=2, disk_cpu_seconds_per_byte=1.2e-10, layer_seconds=0.0)
    assert decode_seconds(traffic(on_cpu=True, **shape), hardware) == pytest.approx(1.36)
    assert decode_seconds(traffic(on_cpu=False, **shape), hardware) == pytest.approx(1.0)
    assert decode_seconds(traffic(on_cpu=True, reads_ahead=False, **shape), hardware) == pytest.approx(1.0)


def test_the_page_cache_is_copied_by_the_cpu_that_computes_and_beside_the_accelerator() -> None:
    shape = {"weight_bytes": 10**10, "disk_bytes": 0, "cached_bytes": 10**10, "h2d_bytes": 0, "first_h2d_bytes": 0}
    hardware = machine(weights=1e10, host_copy=1e10, layer_seconds=0.0)
    assert decode_seconds(traffic(on_cpu=True, **shape), hardware) == pytest.approx(2.0)
    assert decode_seconds(traffic(on_cpu=False, **shape), hardware) == pytest.approx(1.0)


def test_without_reading_ahead_moving_and_computing_add_up() -> None:
    hardware = machine(disk=4.3e9, h2d=8.6e9, weights=12.9e9, layer_seconds=0.0)
    assert decode_seconds(traffic(), hardware) == pytest.approx(1.0)
    assert decode_seconds(traffic(reads_ahead=False), hardware) == pytest.approx(2.0)


def test_the_first_call_reads_everything_and_later_ones_what_is_streamed() -> None:
    prediction = predict(traffic(), replace(ONLY_LINKS, disk=rate(4.3e9)), 1, 100, 100)
    assert prediction.prefill_seconds == pytest.approx(3.0)
    assert prediction.warm_prefill_seconds == prediction.decode_seconds == pytest.approx(1.0)
    assert prediction.generate_seconds(1) == prediction.prefill_seconds
    assert prediction.generate_seconds(11) == pytest.approx(3.0 + 10 * 1.0)


def test_assumed_rates_are_named_and_only_those_that_count() -> None:
    hardware = replace(machine(), disk=rate(7e9, "assumed: NVMe on PCIe 4"), host_copy=rate(1e10, "assumed: DDR4"))
    prediction = predict(traffic(), hardware, 1, 1, 0)
    assert prediction.assumed == ("disk",)
    assert set(prediction.rates) == {"disk", "h2d", "weights", "flops"}
    assert prediction.rates["disk"] == hardware.disk


def test_a_link_without_a_rate_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="rates of a desktop have no 'h2d'"):
        predict(traffic(), replace(machine(), h2d=None), 1, 1, 0)
    on_cpu = traffic(on_cpu=True, h2d_bytes=0, first_h2d_bytes=0)
    assert math.isfinite(decode_seconds(on_cpu, replace(machine(), h2d=None, h2d_pageable=None)))


def test_an_accelerator_decodes_what_crosses_in_the_memory_that_it_computes_from() -> None:
    """As long as the bus takes longer, that costs nothing."""
    moved = traffic(disk_bytes=0, h2d_bytes=10**9, decoding_traffic_per_byte=60.0)
    for weights, bottleneck in ((5e12, "H2D"), (500e9, "memory bandwidth")):
        hardware = machine(weights=weights, flops=ENDLESS, layer_seconds=0.0)
        prediction = predict(moved, hardware, 1, 1, 0)
        assert prediction.bottleneck == bottleneck
        assert prediction.links["memory bandwidth"] == pytest.approx((moved.weight_bytes + 60e9) / weights)
        assert prediction.links["H2D"] == pytest.approx(1e9 / 25e9)
