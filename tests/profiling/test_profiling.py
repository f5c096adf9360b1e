"""Profiles tell the truth: against a device whose times are known, against the plan's bytes, and about failures."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from airstream import ArgumentError, UnsupportedError
from airstream.profiling import profile_data
from airstream.profiling.costs import Costs, LinkUse
from airstream.profiling.intervals import blame, merge, total, within
from airstream.profiling.plot import _latest
from airstream.profiling.profile import Profile
from airstream.profiling.profile_data import MemoryUse, PassProfile
from airstream.profiling.recorder import Recorder
from airstream.rates.facts import Rate
from airstream.reporting import probe as probe_module
from airstream.reporting.probe import CONVERT, DISK, H2D, HOST_COPY, LINKS, Probe, Span
from airstream.transfer.cpu import CpuBackend
from tests.conftest import WriteTiny, simulated_accelerator, stream
from tests.stand_ins.sim import SimDevice, StillClock

IDS = torch.arange(3, 12)[None]
KERNEL_SECONDS = 0.003
GAP_SECONDS = 0.5 * KERNEL_SECONDS
"""A longer pause of the compute stream is a stall: shorter ones are the host's, between two kernels."""


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", torch.bfloat16)


def gaps(busy: Sequence[tuple[float, float]]) -> float:
    """Seconds of the pauses between stretches of work that are long enough to be waiting for something."""
    pauses = [start - end for (_, end), (start, _) in itertools.pairwise(busy)]
    return sum(pause for pause in pauses if pause > GAP_SECONDS)


# ---------------------------------------------------------------------------------------------------------- the truth


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> StillClock:
    """The clock of profiles and of the device. It stands still but for waits: no other program has a part in it.

    What threads of the host do takes no time: the clock may well go on while one of them is in the middle of a read.
    """
    clock, everybodys = StillClock(), probe_module.now
    for name, module in list(sys.modules.items()):
        if name.startswith("airstream.") and getattr(module, "now", None) is everybodys:
            monkeypatch.setattr(module, "now", clock.now)
    monkeypatch.setattr(Probe.span, "__defaults__", (lambda: 0.0,))
    return clock


@contextmanager
def slow_model(folder: Path, host: StillClock, bytes_per_second: float) -> Iterator[tuple[Any, SimDevice]]:
    """A streamed model on a device whose kernels and copies take known times, after a pass that has warmed it up."""
    times = {"kernel_seconds": KERNEL_SECONDS, "copy_bytes_per_second": bytes_per_second, "host": host}
    with simulated_accelerator(**times) as device, stream(folder, "sim:0") as model:
        model(IDS.to("sim:0"))
        yield settled(model), device


@pytest.mark.parametrize("layer_seconds", [0.4, 0.02], ids=["the bus is slow", "the bus is fast"])
def test_a_profile_equals_the_truth_of_the_device(folder: Path, host: StillClock, layer_seconds: float) -> None:
    with stream(folder) as model:
        bytes_per_second = model.plan.batches[1].nbytes / layer_seconds
    with slow_model(folder, host, bytes_per_second) as (model, device), model.profile() as profile:
        device.compute_stream.busy.clear()
        copying = model._engine.machinery.backend._bus.stream.busy
        copying.clear()
        ids = IDS.to("sim:0")
        started = host.now()
        for _ in range(3):
            model(ids)
        wall = host.now() - started
        costs, compute = profile.total, device.compute_stream.busy
        copies = [(start, end) for start, end in copying if end <= profile.started + profile.total.wall_seconds]

    assert costs.passes == 3
    assert costs.compute_seconds == pytest.approx(total(compute), abs=0.02 * wall)
    assert costs.stall_seconds == pytest.approx(gaps(compute), abs=0.02 * wall)
    assert costs.wall_seconds == pytest.approx(compute[-1][1] - compute[0][0], abs=0.02 * wall)
    assert costs.python_seconds < 0.02 * wall
    assert (costs.stall_seconds > 0.3 * wall) is (layer_seconds > 0.1), "the case is not what it is meant to be"
    assert copies
    # Threads read on: one copy that ends as the profile does may be on either side of its end, and no part of one.
    truths = [total(copying[: len(copies) + more]) for more in (-1, 0, 1)]
    assert any(costs.links[H2D].seconds == pytest.approx(truth, rel=0.02) for truth in truths)
    assert costs.links[H2D].bytes_per_second == pytest.approx(bytes_per_second, rel=0.02)
    if layer_seconds > 0.1:
        later = [each.costs for each in profile.passes[1:]]  # what the first waited for was queued before it
        assert all(each.stalls[H2D] > 0.95 * each.stall_seconds for each in later)
        assert profile.bottleneck == H2D


# By when each pass ends, and when each transfer begins and ends. Every transfer moves one byte.
STRADDLING = {
    "one transfer after the other": ([4.0, 8.0], [(0.0, 3.0), (3.0, 6.0)], [(3.0, 1), (3.0, 1)]),
    "two at once, of which one is still under way when a pass ends": (
        [4.0, 8.0],
        [(0.0, 3.0), (1.0, 6.0)],
        [(3.0, 1), (3.0, 1)],
    ),
    "one all the while others end": (
        [4.0, 8.0],
        [(0.0, 1.0), (0.0, 7.0), (2.0, 3.0), (4.0, 5.0)],
        [(2.0, 2), (5.0, 2)],
    ),
    "one that the profile ends in the middle of": ([4.0, 8.0], [(0.0, 2.0), (7.0, 9.0)], [(2.0, 1), (0.0, 0)]),
    "one whose end was read from a later anchor": ([4.0, 8.0], [(4.0, 3.999), (5.0, 6.0)], [(0.0, 1), (1.0, 1)]),
}


@pytest.mark.parametrize(("ends", "transfers", "uses"), STRADDLING.values(), ids=STRADDLING)
def test_bytes_and_seconds_of_a_transfer_count_once_and_in_the_same_pass(
    host: StillClock,
    ends: Sequence[float],
    transfers: Sequence[tuple[float, float]],
    uses: Sequence[tuple[float, int]],
) -> None:
    profile = Profile("m", "cpu", "bfloat16", started=0.0)
    recorder = Recorder(profile, CpuBackend(1 << 12), lambda _: None)
    for start, end in transfers:
        recorder.add(Span("H2D stream", H2D, start, end, 1))
    for end in ends:
        recorder.begin_pass(None)
        host.sleep_until(end)
        recorder.end_pass(True)
    assert [(each.costs.links[H2D].seconds, each.costs.links[H2D].nbytes) for each in profile.passes] == uses
    assert profile.total.io_seconds == sum(seconds for seconds, _ in uses)


@pytest.mark.parametrize("kind", ["wall clock", "process time"])
def test_a_clock_around_asynchronous_work_is_wrong_by_more_than_half(folder: Path, host: StillClock, kind: str) -> None:
    clock = host.now if kind == "wall clock" else time.process_time
    naive: list[float] = []
    kernels: list[int] = []
    with slow_model(folder, host, 1e12) as (model, device), model.profile() as profile:
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda *_: naive.append(-clock()))
            layer.register_forward_pre_hook(lambda *_: kernels.append(-len(device.compute_stream.busy)))
            layer.register_forward_hook(lambda *_: naive.append(clock()))
            layer.register_forward_hook(lambda *_: kernels.append(len(device.compute_stream.busy)))
        model(IDS.to("sim:0"))
    measured = sum(layer.compute_seconds for name, layer in profile.layers.items() if ".layers." in name)
    truth = sum(kernels) * KERNEL_SECONDS
    assert measured == pytest.approx(truth, rel=0.02)
    assert sum(naive) < 0.5 * truth


def test_process_time_misses_the_waiting(folder: Path, host: StillClock) -> None:
    with slow_model(folder, host, 1e6) as (model, _), model.profile() as profile:
        started = time.process_time()
        model(IDS.to("sim:0"))
        cpu_seconds = time.process_time() - started
    assert cpu_seconds < 0.5 * profile.total.wall_seconds


# ------------------------------------------------------------------------------------------------------ adding it up


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
def test_parts_add_up_and_bytes_are_the_plans(folder: Path, device: str) -> None:
    with simulated_accelerator(), stream(folder, device, profiling_mode=True) as model:
        tokens = model.generate(IDS.to(device), max_new_tokens=6, do_sample=False)
        profile, plan = model.last_profile, model.plan
        assert [each.phase for each in profile.passes] == ["prefill"] + ["decode"] * 5
        for each in profile.passes:
            costs = each.costs
            parts = costs.compute_seconds + costs.stall_seconds + costs.python_seconds
            assert parts == pytest.approx(costs.wall_seconds, rel=1e-6)
            assert min(costs.compute_seconds, costs.stall_seconds, costs.python_seconds) >= 0
            assert sum(costs.stalls.values()) == pytest.approx(costs.stall_seconds)
            assert costs.read_bytes == plan.read_bytes
            assert costs.row_bytes > 0
            assert each.is_complete
            assert each.batch_size == 1
        total_bytes = sum(each.costs.read_bytes + each.costs.row_bytes for each in profile.passes)
        ahead = model.stats.streamed_bytes - sum(each.costs.read_bytes for each in profile.passes)
        assert profile.total.links[DISK].nbytes <= total_bytes + ahead
        assert profile.new_tokens == tokens.shape[1] - IDS.shape[1]
        assert len(profile.ttft_seconds) == 1
        assert profile.ttft_seconds[0] == pytest.approx(profile.prefill.wall_seconds)
        assert 0 <= profile.total.hidden <= 1


def test_spans_nest_and_cover_the_time(folder: Path) -> None:
    with stream(folder) as model, model.profile() as profile:
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    compute = [span for span in profile.spans if span.track == "compute"]
    forwards = [span for span in compute if span.kind == "forward"]
    inner = [span for span in compute if span.kind != "forward"]
    assert len(forwards) == 4
    for span in inner:
        assert any(outer.start <= span.start <= span.end <= outer.end for outer in forwards), span
    for one, other in itertools.pairwise(inner):
        assert one.end <= other.start or other.end <= one.start or one.kind == "convert", (one, other)
    python = [span for span in profile.spans if span.track == "Python"]
    whole = total(merge((span.start, span.end) for span in [*forwards, *python]))
    assert whole == pytest.approx(profile.total.wall_seconds, rel=1e-6)


def test_layers_are_profiled_whether_they_stay_or_not(folder: Path) -> None:
    with stream(folder, max_memory="1GiB") as model:
        assert not model.plan.streamed_bytes
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        with model.profile() as profile:
            model.generate(IDS, max_new_tokens=3, do_sample=False)
    units = [unit for batch in model.plan.batches for unit in batch.units]
    assert list(profile.layers) == units
    assert all(layer.passes == 3 and layer.compute_seconds > 0 for layer in profile.layers.values())
    assert profile.total.read_bytes == 0
    assert profile.total.stall_seconds == 0
    assert profile.total.hidden == 1


def test_weights_in_host_memory_are_bytes_of_the_bus(folder: Path) -> None:
    with simulated_accelerator(), stream(folder, "sim:0") as model:
        least = dict(model.plan.peak_bytes)
    memory = {0: least["0"], "cpu": "1GiB"}
    for is_pinnable in (True, False):
        with (
            simulated_accelerator(is_pinnable=is_pinnable),
            stream(folder, "sim:0", max_memory=memory) as model,
            settled(model).profile() as profile,
        ):
            model.generate(IDS.to("sim:0"), max_new_tokens=4, do_sample=False)
            hosted = sum(unit_bytes(model, name) for name in profile.layers)
        assert all(each.costs.host_bytes == hosted for each in profile.passes)
        assert profile.passes[-1].costs.read_bytes == model.plan.read_bytes
        assert profile.total.links[H2D].nbytes >= 3 * hosted  # some of the first pass was read ahead before
        assert bool(profile.total.links[HOST_COPY].nbytes) is not is_pinnable


def settled(model: Any) -> Any:
    """`model` with all in memory that stays there, and pinned."""
    model.measure_link()
    return model


def test_what_is_loaded_for_good_counts_once(folder: Path) -> None:
    with stream(folder, max_memory="1GiB", profiling_mode=True) as model:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        model.measure_link()  # waits for what is loaded once; the embedding table need not be there before
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        profile = model.last_profile
        first, *others = (each.costs for each in profile.passes)
        assert first.read_bytes == sum(unit_bytes(model, name) for name in profile.layers)
        assert not any(costs.read_bytes for costs in others)
        table = model.get_input_embeddings().weight
        row_bytes = [costs.row_bytes for costs in (first, *others)]
        loaded = row_bytes.index(table.nbytes)
        assert all(0 < nbytes <= IDS.numel() * table.nbytes // table.shape[0] for nbytes in row_bytes[:loaded])
        assert not any(row_bytes[loaded + 1 :]), "the table is in memory"


def unit_bytes(model: Any, name: str) -> int:
    return sum(parameter.nbytes for parameter in model.get_submodule(name).parameters())


def test_casts_are_seen(folder: Path) -> None:
    with stream(folder, dtype="float32", prefetch_batches=0) as model, model.profile() as profile:
        model(IDS)
        assert profile.total.links[CONVERT].nbytes == profile.total.read_bytes == model.plan.read_bytes


# ----------------------------------------------------------------------------------------------------------- on and off


def test_off_nothing_is_recorded_and_on_again_it_is(folder: Path) -> None:
    with stream(folder) as model:
        assert model.last_profile is None
        model(IDS)
        with model.profile() as first:
            model(IDS)
        model(IDS)
        assert first.total.passes == 1
        with model.profile() as second:
            model(IDS)
            model(IDS)
        assert (first.total.passes, second.total.passes) == (1, 2)
        assert model.last_profile is second


def test_a_profile_inside_another_pauses_it(folder: Path) -> None:
    with stream(folder, profiling_mode=True) as model:
        whole = model.last_profile
        model(IDS)
        with model.profile() as part:
            model(IDS)
        model(IDS)
    assert (whole.total.passes, part.total.passes) == (2, 1)


def test_results_are_the_same_bits(folder: Path) -> None:
    with stream(folder) as model, torch.no_grad():
        expected = model(IDS).logits
        with model.profile():
            assert torch.equal(model(IDS).logits, expected)


def test_measuring_the_link_is_no_part_of_a_pass(folder: Path) -> None:
    with stream(folder, prefetch_batches=0) as model, model.profile() as profile:
        model.measure_link()
        model(IDS)
        assert profile.total.links[DISK].nbytes <= model.plan.read_bytes + profile.total.row_bytes


def test_a_base_model_called_alone_is_a_pass_and_within_another_is_not(folder: Path) -> None:
    with stream(folder) as model, model.profile() as profile:
        model.model(IDS)
        model(IDS)
    assert profile.total.passes == 2


def test_long_profiles_stay_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Profile("m", "cpu", "bfloat16", started=0.0)
    for number in range(profile_data.MAX_PASSES + 500):
        costs = Costs(passes=1, wall_seconds=1.0)
        profile.add(PassProfile(number, "prefill" if number == 0 else "decode", 1, float(number), True, costs))
        profile.spans.extend(Span("compute", "compute", 0.0, 1.0) for _ in range(100))
    assert len(profile.spans) <= profile_data.MAX_SPANS
    assert len(profile.passes) == profile_data.MAX_PASSES + 1
    assert profile.passes[0].number == 0
    assert profile.total.wall_seconds == profile_data.MAX_PASSES + 500


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
def test_a_failed_generation_leaves_a_whole_profile(folder: Path, device: str, tmp_path: Path) -> None:
    with simulated_accelerator(), stream(folder, device, profiling_mode=True) as model:
        calls = iter([None, None, KeyboardInterrupt()])

        def interrupt(*_: object) -> None:
            if error := next(calls):
                raise error

        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(IDS.to(device), max_new_tokens=6, do_sample=False)
        handle.remove()
        profile = model.last_profile
        assert [each.is_complete for each in profile.passes] == [True, True, False]
        assert profile.new_tokens == 2
        model.generate(IDS.to(device), max_new_tokens=2, do_sample=False)
        assert len(profile.passes) == 5
    for each in profile.passes:
        costs = each.costs
        parts = costs.compute_seconds + costs.stall_seconds + costs.python_seconds
        assert parts == pytest.approx(costs.wall_seconds, rel=1e-6)
    json.loads(profile.to_json())
    assert str(profile)
    profile.save_trace(tmp_path / "run.json")


def test_a_prompt_in_chunks_is_one_prefill_of_several_passes(folder: Path) -> None:
    with stream(folder) as model, model.profile() as profile:
        model.generate(IDS, max_new_tokens=3, do_sample=False, prefill_chunk_size=4)
    assert [each.phase for each in profile.passes].count("prefill") == 3
    assert profile.new_tokens == 3
    assert profile.ttft_seconds[0] == pytest.approx(profile.prefill.wall_seconds, rel=0.05)


def test_memory_is_compared_with_the_plan(folder: Path) -> None:
    with simulated_accelerator(), stream(folder, "sim:0", profiling_mode=True) as model:
        model.generate(IDS.to("sim:0"), max_new_tokens=3, do_sample=False)
        memory = model.last_profile.memory
        assert set(memory) == {"0", "cpu"}
        assert {what for _, what, _ in model.last_profile.sizes} == {"ring", "host memory", "device memory"}
        assert 0 < memory["0"].peak_bytes <= memory["0"].planned_bytes <= memory["0"].budget_bytes
        assert memory["0"].planned_bytes == model.plan.tiers["0"].peak_bytes


# --------------------------------------------------------------------------------------------------------------- shown


@pytest.fixture(scope="module")
def shown(tiny: WriteTiny) -> Profile:
    with stream(tiny("llama", torch.bfloat16)) as model, model.profile() as profile:
        model.generate(IDS, max_new_tokens=5, do_sample=False)
    return profile


def test_the_table_fits_and_says_what_it_is_about(shown: Profile) -> None:
    lines = str(shown).splitlines()
    assert max(map(len, lines)) <= 80
    assert "on cpu, bfloat16" in lines[0]
    for word in ("compute", "stall", "sampling and Python", "disk", "hidden", "bottleneck", "planned"):
        assert any(word in line for line in lines), word


def test_a_long_name_is_cut_and_an_empty_profile_says_so(tmp_path: Path) -> None:
    profile = Profile("a/" * 60, "cuda:0", "bfloat16", started=0.0)
    assert "nothing has run yet" in str(profile)
    assert max(map(len, str(profile).splitlines())) <= 80
    profile.save_trace(tmp_path / "run.json")
    pytest.importorskip("matplotlib")
    profile.plot(tmp_path / "run.png")


def test_the_table_of_large_numbers_fits_too() -> None:
    profile = Profile("m" * 100, "cuda:0", "bfloat16", 0.0, dict.fromkeys(LINKS, Rate(25.123e9, "measured " * 9)))
    causes = dict.fromkeys((*LINKS, "embedding rows", "scheduling"), 7000.0)
    for phase in ("prefill", "decode"):
        links = {link: LinkUse(9000.0, 1 << 43) for link in LINKS}
        costs = Costs(1, 9, 90_000.0, 9000.0, 42_000.0, 9000.0, 9000.0, stalls=dict(causes), links=links)
        profile.add(PassProfile(0, phase, 16, 0.0, True, costs))
    profile.new_tokens, profile.decoded_tokens, profile.predicted_seconds = 10**7, 10**7, 7322.0e7
    profile.ttft_seconds.append(7322.0)
    profile.layer("model.layers." * 9).waited(causes)
    profile.memory["cpu"] = MemoryUse(1 << 42, 1 << 42, 1 << 42)
    assert max(map(len, str(profile).splitlines())) <= 80
    assert "assumed rates" not in str(profile)
    profile.is_predicted_by_guess = True
    assert max(map(len, str(profile).splitlines())) <= 80
    assert "by assumed rates (airstream hardware measures them)" in " ".join(str(profile).split())
    assert "for disk " in str(profile)
    profile.is_direct = False
    assert max(map(len, str(profile).splitlines())) <= 80
    assert "for disk/page cache " in str(profile)
    assert "for disk " not in str(profile)


def test_where_a_rate_comes_from_is_told_in_whole_words() -> None:
    profile = Profile("tiny", "cpu", "bfloat16", 0.0, {"disk": Rate(3.3e9, "assumed: NVMe on PCIe 3")})
    costs = Costs(1, 1, 1.0, 0.5, 0.0, 0.0, 0.0, stalls={}, links={"disk": LinkUse(0.5, 1 << 30)})
    profile.add(PassProfile(0, "decode", 1, 0.0, True, costs))
    (line,) = [line for line in str(profile).splitlines() if line.startswith("disk ")]
    assert line.endswith("%  assumed")


def test_what_the_page_cache_gives_is_not_held_against_the_disk(folder: Path) -> None:
    with stream(folder, page_cache=True) as model, model.profile() as profile:
        model(IDS)
        assert DISK not in model._engine.observer.rates
    assert "through page cache" in str(profile)
    assert max(map(len, str(profile).splitlines())) <= 80
    assert not profile.to_dict()["is_direct"]


def test_a_read_that_fails_has_moved_nothing() -> None:
    probe, spans = Probe(), []
    probe.listener = types.SimpleNamespace(add=spans.append)  # type: ignore[assignment]
    with pytest.raises(OSError, match="broken"), probe.span(DISK, 100):
        raise OSError("broken")
    with probe.span(DISK, 7):
        pass
    assert [span.nbytes for span in spans] == [0, 7]


def test_json_has_all_figures(shown: Profile) -> None:
    data = json.loads(shown.to_json())
    assert len(data["passes"]) == 5
    assert data["seconds_per_token"] == pytest.approx(shown.decode.wall_seconds / 4)
    assert data["decode"]["links"]["disk"]["nbytes"] == shown.decode.links["disk"].nbytes
    assert data["total"]["wall_seconds"] == pytest.approx(
        data["prefill"]["wall_seconds"] + data["decode"]["wall_seconds"]
    )


def test_a_dataframe_if_pandas_is_there(shown: Profile) -> None:
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(UnsupportedError, match="pip install pandas"):
            shown.to_dataframe()
        return
    frame = shown.to_dataframe()
    assert list(frame["phase"]) == ["prefill"] + ["decode"] * 4
    assert frame["disk: bytes"].sum() == shown.total.links["disk"].nbytes


def test_a_trace_has_a_track_for_each_link(shown: Profile, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    shown.save_trace(file)
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "Python"} < names
    assert any(name.startswith("reader-") for name in names)
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in slices)
    assert {"model.layers.0", "lm_head"} <= {event["name"] for event in slices}
    assert {event["name"] for event in events if event["ph"] == "C"} == {"ring", "host memory"}
    assert (
        sum(event["args"].get("bytes", 0) for event in slices if event["cat"] == "disk")
        == shown.total.links["disk"].nbytes
    )
    assert list(tmp_path.iterdir()) == [file]


def test_a_trace_that_cannot_be_written_leaves_nothing(shown: Profile, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be written"):
        shown.save_trace(tmp_path / "missing" / "run.json")
    (tmp_path / "run.json").mkdir()
    with pytest.raises(ArgumentError, match="cannot be written"):
        shown.save_trace(tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_link_is_written_through_and_a_pipe_is_refused(shown: Profile, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for save, name in ((shown.save_trace, "run.json"), (shown.plot, "run.png")):
        link, file, pipe = tmp_path / f"link-{name}", tmp_path / name, tmp_path / f"pipe-{name}"
        link.symlink_to(name)
        save(link)
        assert link.is_symlink()
        assert file.stat().st_size > 1000
        os.mkfifo(pipe)
        with pytest.raises(ArgumentError, match="cannot be written: it is a pipe"):
            save(pipe)
        assert pipe.is_fifo()


def test_a_picture_is_drawn(shown: Profile, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = shown.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    lanes, seconds = figure.axes
    assert {"compute", "Python"} <= {label.get_text() for label in lanes.get_yticklabels()}
    assert [label.get_text() for label in seconds.get_yticklabels()] == ["a decode pass", "a prefill pass"]
    title = seconds.get_legend().get_title()
    assert "white between: nothing is done" in title.get_text()
    figure.canvas.draw()
    place = title.get_window_extent()
    assert 0 <= place.x0 < place.x1 <= figure.bbox.width  # all of it can be read
    with pytest.raises(ArgumentError, match="no kind of picture"):
        shown.plot(tmp_path / "run.txt")


# ---------------------------------------------------------------------------------------------------------- arithmetic

intervals = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)).map(lambda pair: (min(pair), max(pair))), max_size=8)


@given(intervals)
def test_merged_stretches_are_disjoint_and_as_long_as_the_union(stretches: list[tuple[float, float]]) -> None:
    merged = merge(stretches)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(merged))
    points = [number / 100 for number in range(1001)]
    inside = [any(start <= point <= end for start, end in stretches) for point in points]
    assert inside == [any(start <= point <= end for start, end in merged) for point in points]


@given(intervals, intervals)
def test_blame_is_shared_out_without_rest(disk: list[tuple[float, float]], bus: list[tuple[float, float]]) -> None:
    busy = {"disk": merge(disk), "H2D": merge(bus)}
    causes = blame(2.0, 7.0, busy, otherwise="scheduling")
    assert sum(causes.values()) == pytest.approx(5.0)
    longest = max(busy, key=lambda link: total(within(busy[link], 2.0, 7.0)))
    share = total(within(busy[longest], 2.0, 7.0))
    assert causes.get(longest, 0.0) == pytest.approx(share, abs=1e-9) or share == 0


def test_a_probe_nobody_listens_to_makes_nothing() -> None:
    probe = Probe()
    assert probe.span(DISK, 1) is probe.span(H2D, 2)


def passes(*phases: str) -> list[PassProfile]:
    return [PassProfile(number, phase, 1, float(number), True, Costs()) for number, phase in enumerate(phases)]


P, D = "prefill", "decode"


@pytest.mark.parametrize(
    ("phases", "shown"),
    [
        ((P, D, D), [1, 2]),
        ((P, D), [1]),
        ((P,), [0]),
        ((P, P), [1]),
        ((P, D, D, D, D), [2, 3, 4]),
        ((P, D, P, D, D), [3, 4]),
        ((), []),
    ],
    ids=str,
)
def test_a_prompt_does_not_take_the_width_of_the_picture(phases: Sequence[str], shown: list[int]) -> None:
    """A pass over a prompt lasts many times longer than the passes of decoding that the lanes are about."""
    assert [each.number for each in _latest(passes(*phases))] == shown
