"""A rate is a number with the link that it is of, or there is none: what `measure_link` and the reports say."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from airstream import AutoModel
from airstream.loading import machine
from airstream.profiling.live import LiveLine
from airstream.profiling.report import Meter
from airstream.rates.facts import Rate, assumed
from airstream.rates.links import measure_pinned
from airstream.reporting.probe import DISK, H2D
from airstream.transfer import files
from tests.conftest import WriteTiny, simulated_accelerator, stream
from tests.stand_ins.threads import InThread

IDS = torch.arange(3, 12)[None]
SLOW = 20e6
"""Bytes per second of a bus that is slower than any disk."""


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", torch.bfloat16)


def hosting(folder: Path, prefetch: int = 1) -> dict[int | str, Any]:
    """Budgets of `sim:0` under which weights come from host memory, all that are streamed."""
    with stream(folder, "sim:0", prefetch_batches=prefetch) as model:
        return {0: model.plan.peak_bytes["0"], "cpu": "1GiB"}


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_copies_that_are_queued_have_not_arrived(folder: Path, prefetch: int) -> None:
    """The time is that of the bytes that it is given with, on the slowest part of their way."""
    with simulated_accelerator():
        memory = hosting(folder, prefetch)
    with (
        simulated_accelerator(copy_bytes_per_second=SLOW) as sim,
        stream(folder, "sim:0", max_memory=memory, prefetch_batches=prefetch) as model,
    ):
        assert model.plan.streamed_bytes > 0
        assert not model.plan.read_bytes
        model.measure_link()  # from here on, what is loaded once is there, and copies are of passes alone
        for _ in range(2):
            before = sim.h2d_bytes
            link = model.measure_link()
            assert link.link == "host memory"
            assert link.bytes_per_second is not None
            assert link.bytes_per_second <= SLOW
            assert sim.h2d_bytes - before == link.nbytes > 0, "it measured other bytes than it says"


def test_bytes_from_disk_are_waited_for_on_the_device_too(folder: Path) -> None:
    with simulated_accelerator(copy_bytes_per_second=SLOW), stream(folder, "sim:0") as model:
        link = model.measure_link()
        assert link.nbytes == model.plan.read_bytes > 0
        assert link.bytes_per_second is not None
        assert link.bytes_per_second <= SLOW


def test_bytes_from_both_are_named_both(folder: Path) -> None:
    with simulated_accelerator():
        with stream(folder, "sim:0", page_cache=True) as model:
            least = dict(model.plan.peak_bytes)
        some = least["cpu"] + model.plan.streamed_bytes // 2
        with stream(folder, "sim:0", max_memory={0: least["0"], "cpu": some}, page_cache=True) as model:
            assert model.plan.read_bytes > 0
            assert model.plan.hosted_bytes > 0
            link = model.measure_link()
    assert link.link == "page cache and host memory"
    assert "B/s from page cache and host memory (" in str(link)


@pytest.mark.parametrize("page_cache", [True, False])
def test_what_the_page_cache_gives_is_not_called_the_disk(folder: Path, page_cache: bool) -> None:
    with stream(folder, page_cache=page_cache) as model:
        name = "disk" if model._engine.machinery.reader.direct else "page cache"
        assert name == "page cache" or not page_cache
        link = model.measure_link()
        assert (link.link, link.nbytes) == (name, model.plan.read_bytes)
        assert said_by_the_live_line(model) == name
        assert said_by_the_report(model) == name


@pytest.mark.skipif(not files.HAS_PREADV, reason="there is no preadv to fail")
def test_nor_is_it_after_direct_reads_were_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stream(folder, page_cache=False) as model:
        if not model._engine.machinery.reader.direct:
            pytest.skip("this file system refuses direct reads from the beginning")
        assert model.measure_link().link == "disk"
        assert DISK in model._engine.observer.rates
        real, refused = os.preadv, list[int]()

        def refuse_once(descriptor: int, buffers: list[Any], offset: int) -> int:
            if not refused:
                refused.append(offset)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", refuse_once)
        model(IDS)
        assert model.measure_link().link == "page cache"
        assert DISK not in model._engine.observer.rates, "the disk's rate is no limit of the page cache"
        assert said_by_the_live_line(model) == "page cache"
        with model.profile() as profile:
            model(IDS)
        assert not profile.is_direct


def test_without_streaming_there_is_no_link(folder: Path) -> None:
    with stream(folder, max_memory="1GiB") as model:
        model(IDS)
        link = model.measure_link()
        assert (link.link, link.nbytes, link.bytes_per_second) == (None, 0, None)
        assert "nothing is streamed" in str(link)
        assert said_by_the_live_line(model) == ""
        assert said_by_the_report(model) == ""


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_pass_that_ends_within_a_layer_batch_holds_nothing(folder: Path, prefetch: int) -> None:
    """What it held was never given back: whatever came next waited for it for ever."""
    with stream(folder, layers_per_batch=2, prefetch_batches=prefetch) as model:
        model.config.num_hidden_layers = 1  # so drafts the model that leaves early
        model.model(IDS)
        link = InThread(model.measure_link).finish(60)
        assert link.error is None
        assert link.result.nbytes == model.plan.read_bytes


def test_the_live_line_says_what_crosses_the_bus(folder: Path) -> None:
    with simulated_accelerator():
        memory = hosting(folder)
        with stream(folder, "sim:0", max_memory=memory) as model:
            model(IDS.to("sim:0"))
            assert H2D in model._engine.observer.rates
            assert said_by_the_live_line(model) == "host memory"


def said_by_the_live_line(model: Any) -> str:
    """What it names as the source of bytes, "" if it has none."""
    line = LiveLine(model._engine.observer, model.stats, lambda *_: None)
    with line.following():
        model.generate(IDS.to(model.device), max_new_tokens=3, do_sample=False)
    return source_in(line.text())


def said_by_the_report(model: Any) -> str:
    meter = Meter()
    meter.start(model.stats)
    model(IDS)
    report = meter.report(model.plan, model.stats)
    assert (report.read_bytes_per_second is None) is (report.streamed_bytes == 0)
    return source_in(str(report))


def source_in(text: str) -> str:
    assert "0.00" not in text
    found = re.search(r"[\d.]+ [GMk]B/s from ([a-z ]+?)(?: \(|,|$)", text, re.MULTILINE)
    return found[1] if found else ""


# --------------------------------------------------------------------------------- rates that nobody has measured yet


def test_the_link_to_an_accelerator_is_measured_when_a_model_is_loaded(folder: Path) -> None:
    """The wrong guess was 25 GB/s; here the bus is a thousand times slower, and never faster than it is."""
    with simulated_accelerator(copy_bytes_per_second=SLOW) as sim, stream(folder, "sim:0") as model:
        rate = model.plan.prediction.rates["h2d"]
        assert 0 < rate.per_second <= SLOW
        assert rate.is_measured
        assert "h2d" not in model.plan.prediction.assumed
        assert "measured while the model was loaded" in str(model.plan)
        assert sim.allocated_bytes < 8 << 20, "what it was measured with is still there"


@pytest.mark.parametrize("pinnable", [True, False])
def test_without_pinned_memory_or_room_the_guess_stays(folder: Path, pinnable: bool) -> None:
    with simulated_accelerator(memory_limit=1 << 20 if pinnable else None, is_pinnable=pinnable) as sim:
        assert measure_pinned(sim.device) is None
        assert sim.pinned_bytes == 0
        assert machine.with_measured_link(assumed("sim"), sim.device) == assumed("sim")


def test_a_rate_that_is_on_file_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_pinned", None)
    known = replace(assumed("sim"), h2d=Rate(3e9, "measured 2026-11-25"))
    assert machine.with_measured_link(known, torch.device("sim", 0)) is known
    assert machine.with_measured_link(assumed("cpu"), torch.device("cpu")) == assumed("cpu")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("measured 2026-11-25; while other programs used 1.2 cores", "measured while other programs used 1.2 cores"),
        ("measured 2026-11-25; through the page cache, direct reads refused", "measured through the page cache"),
        ("measured 2026-11-25", ""),
        ("assumed: a mid-range GPU; or better", ""),
        ("data sheet: RTX 3090", ""),
    ],
)
def test_the_plan_says_how_its_rates_were_measured(
    folder: Path, source: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = replace(assumed("cpu"), weights={"bfloat16": Rate(15e9, source)})
    monkeypatch.setattr(machine, "facts_for", lambda *_: known)
    text = str(AutoModel.plan(folder, device="cpu"))
    assert ("airstream hardware --refresh, when the machine is idle, measures again" in text) is bool(said)
    assert said in text
    assert max(map(len, text.splitlines())) <= 100
