"""What the hardware can do: numbers with sources, measured in small, kept, looked up; no time is ever asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from airstream import ArgumentError, BudgetError, DiskSpaceError, ReadError
from airstream.cli import main
from airstream.rates import arithmetic, disk, measure, overlap
from airstream.rates import identity as machine
from airstream.rates import saved as store
from airstream.rates.cards import PCIE_X16_GBPS, Card, all_cards, card_facts, find_card
from airstream.rates.effort import Effort, fastest_call, seconds_per_call
from airstream.rates.facts import DTYPES, LINKS, HardwareFacts, Rate, assumed
from airstream.reporting.units import GIB, KIB, MIB
from tests.conftest import simulated_accelerator
from tests.stand_ins.sim import SimDevice, SimRuntime

CPU = torch.device("cpu")
TINY = Effort(
    disk_bytes=512 * KIB,
    disk_seconds=10.0,
    file_bytes=128 * KIB,
    ring_bytes=64 * KIB,
    copy_bytes=100 * KIB,
    pinned_bytes=32 * KIB,
    weights_bytes=64 * KIB,
    matrix=(64, 32),
    max_tokens=64,
    seconds=0.0,
    num_layers=2,
    num_tokens=2,
)
"""Everything is done, on next to nothing."""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, so that nothing is kept for real."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("AIRSTREAM_CACHE", str(folder))
    return folder


def facts(**changes: Any) -> HardwareFacts:
    return dataclasses.replace(assumed("cpu"), **changes)


def write_weights(folder: Path, nbytes: int, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(os.urandom(nbytes))
    return folder


def all_rates(found: HardwareFacts) -> list[Rate]:
    links = [getattr(found, name) for name in LINKS]
    return [found.disk, found.host_copy, *found.weights.values(), *found.flops.values(), *filter(None, links)]


# -------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_json_and_back(device_type: str) -> None:
    before = assumed(device_type)
    assert HardwareFacts.from_json(before.to_json()) == before
    assert HardwareFacts.from_dict(json.loads(json.dumps(before.to_dict()))) == before


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_is_assumed_says_so(device_type: str) -> None:
    found = assumed(device_type)
    assert all(rate.source.startswith("assumed: ") and not rate.is_measured for rate in all_rates(found))
    assert (found.h2d is None) == (device_type == "cpu")
    assert set(found.weights) == set(found.flops) == set(DTYPES)
    assert found.num_cores == os.cpu_count()
    assert assumed("cpu", num_cores=7).num_cores == 7


@pytest.mark.parametrize("number", [0, -1.0, float("nan"), float("inf")])
def test_a_rate_is_a_positive_number(number: float) -> None:
    with pytest.raises(ArgumentError, match=r"\(given\) is not a positive number"):
        Rate(number, "given")


def test_facts_without_arithmetic_are_refused() -> None:
    with pytest.raises(ArgumentError, match="one dtype at least"):
        facts(weights={})
    with pytest.raises(ArgumentError, match=r"layer_seconds is -1\.0, not from 0 to"):
        facts(layer_seconds=-1.0)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ArgumentError, match="not a share"):
            facts(disk_share_while_computing=share)


def test_a_measured_rate_is_known_as_such() -> None:
    assert Rate(1.0, "measured 2026-11-25").is_measured
    assert Rate(1.0, "measured 2026-11-25; other programs used 1.2 cores").is_measured
    assert not Rate(1.0, "given").is_measured


def test_a_dtype_that_was_not_measured_goes_by_what_is_most_like_it() -> None:
    slow, fast = Rate(1e9, "measured 2026-11-25"), Rate(3e9, "measured 2026-11-25")
    found = facts(weights={"float32": slow, "float16": fast}, flops={"float32": fast, "bfloat16": slow})
    assert found.weights_rate("float16") == found.weights_rate("torch.float16") == fast
    stand_in = found.weights_rate("bfloat16")
    assert stand_in.per_second == fast.per_second
    assert stand_in.source == "assumed: as float16, measured 2026-11-25"
    assert not stand_in.is_measured
    assert found.weights_rate("float8_e4m3fn").per_second == slow.per_second
    assert found.flops_rate("float16").per_second == slow.per_second
    assert found.flops_rate(str(torch.float32)) == fast


def test_the_table_has_every_rate_and_its_source() -> None:
    rates = {name: Rate(number * 1e9, f"given {name}") for number, name in enumerate(LINKS, start=1)}
    found = dataclasses.replace(
        assumed("cuda"), **rates, flops={"bfloat16": Rate(71e12, "x"), "float32": Rate(8e9, "y")}
    )
    text = str(found)
    assert all(rate.source in text for rate in all_rates(found))
    assert "71.0 TFLOP/s  x" in text
    assert "8.00 GFLOP/s  y" in text
    assert "to device" not in str(assumed("cpu"))
    assert "e-" not in str(facts(layer_seconds=1e-9, disk=Rate(12_345.0, "a very slow disk")))


# ---------------------------------------------------------------------------------------------------------- measuring


def test_everything_is_measured_on_the_cpu(tmp_path: Path) -> None:
    told: list[str] = []
    found = measure.measure(tmp_path, CPU, told.append, TINY)
    assert all(rate.is_measured for rate in all_rates(found))
    assert set(found.weights) == set(found.flops) == set(DTYPES)
    assert found.h2d is found.h2d_pageable is found.d2h is found.d2h_pageable is None
    assert found.layer_seconds > 0
    assert found.machine == machine.machine_name(CPU)
    assert told == ["the disk", "memory", "arithmetic on cpu", "the disk and the processor at once"]
    assert 0 < found.disk_share_while_computing <= 1
    assert 0 < found.computing_share_while_reading <= 1
    assert list(tmp_path.iterdir()) == []


def test_everything_is_measured_on_an_accelerator(tmp_path: Path, sim: SimDevice) -> None:
    told: list[str] = []
    found = measure.measure(tmp_path, sim.device, told.append, TINY)
    assert all(rate.is_measured for rate in all_rates(found))
    assert len(all_rates(found)) == 2 + 2 * len(DTYPES) + len(LINKS)
    assert told[-1] == "the link to sim:0"
    assert sim.h2d_bytes >= 2 * TINY.copy_bytes
    assert not sim.races
    assert sim.allocated_bytes == 0
    assert "sim" in found.machine


def test_host_memory_that_cannot_be_pinned(tmp_path: Path, sim: SimDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    unpinned: list[Any] = []
    monkeypatch.setattr(SimRuntime, "pin", lambda *_: False)
    monkeypatch.setattr(SimRuntime, "unpin", lambda _, buffer: unpinned.append(buffer))
    assert measure.measure(tmp_path, sim.device, effort=TINY).h2d is not None
    assert not unpinned
    assert not sim.races


def test_pinned_memory_is_given_back_when_copies_fail(sim: SimDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Any] = []
    monkeypatch.setattr(SimRuntime, "pin", lambda _, buffer: pinned.append(buffer) or True)
    monkeypatch.setattr(SimRuntime, "unpin", lambda _, buffer: pinned.clear())
    monkeypatch.setattr(SimRuntime, "copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure.measure_bus(sim.device, pin=True, effort=TINY)
    assert not pinned


def test_a_device_that_is_nearly_full_is_measured_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LEAST_DEVICE_BYTES", 16 * KIB)
    with simulated_accelerator(memory_limit=48 * KIB) as device:
        backend = measure.create_backend(device.device, 1, 4096)
        memory = measure._allocate(backend, 64 * KIB)
        assert memory.nbytes == 32 * KIB
        assert measure._allocate(backend, 64 * KIB).nbytes == 16 * KIB
        filler = backend.allocate(8 * KIB)
        with pytest.raises(BudgetError):
            measure._allocate(backend, 64 * KIB)
        del memory, filler
        backend.close()


def test_random_numbers_of_the_caller_stay_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure.measure(tmp_path, CPU, effort=TINY)
    assert torch.equal(torch.rand(3), expected)


def test_a_dtype_without_kernels_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return torch.nn.functional.linear(tokens, weight)

    monkeypatch.setattr(arithmetic, "linear", picky)
    weights, flops, _ = measure._arithmetic(CPU, TINY)
    assert set(weights) == set(flops) == {"float16", "float32"}


def test_every_weight_is_multiplied_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a cache could hold those that are."""
    seen: dict[torch.dtype, set[int]] = {}
    real = torch.nn.functional.linear

    def spy(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == (1, 1, weight.shape[1])
        seen.setdefault(weight.dtype, set()).update(range(weight.data_ptr(), weight.data_ptr() + weight.nbytes))
        return real(tokens, weight)

    monkeypatch.setattr(arithmetic, "linear", spy)
    backend = measure.create_backend(CPU, 1, 4096)
    arithmetic.measure_weights(backend, backend.allocate(TINY.weights_bytes), TINY)
    assert {dtype: len(addresses) for dtype, addresses in seen.items()} == {
        getattr(torch, name): TINY.weights_bytes for name in DTYPES
    }


def test_a_slow_device_gets_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def slow(work: Callable[[], torch.Tensor], synchronize: object) -> float:
        tried.append(work().shape[1])
        return 1.0 if tried[-1] >= 128 else 0.0

    monkeypatch.setattr(arithmetic, "timed", slow)
    backend, weight = measure.create_backend(CPU, 1, 4096), torch.ones(8, 4)
    effort = dataclasses.replace(TINY, max_tokens=512)
    assert arithmetic._enough_tokens(backend, weight, effort).shape == (1, 128, 4)
    assert tried == [32, 128]


@pytest.mark.parametrize("time_one", [seconds_per_call, fastest_call])
def test_the_device_is_waited_for_before_the_clock_stops(time_one: Callable[..., float]) -> None:
    events: list[str] = []
    assert time_one(lambda: events.append("work"), lambda: events.append("wait"), 0.0) >= 0
    assert events[0] == events[-1] == "wait"
    assert "".join(event[1] for event in events[:3]) == "aoa", "the first call is for warming up"


def test_effort_fits_small_machines() -> None:
    assert Effort().within(64 * GIB) == Effort()
    small = Effort().within(800 * MIB)
    assert small.ring_bytes == small.copy_bytes == small.weights_bytes == 200 * MIB
    rows, columns = Effort().matrix
    assert Effort().within(0).weights_bytes >= rows * columns * torch.float32.itemsize, "one weight at least"
    assert small.file_bytes == Effort().file_bytes


def test_other_programs_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.OtherLoad, "cores", lambda _: 1.24)
    found = measure.measure(tmp_path, CPU, effort=TINY)
    assert found.disk.source.endswith("; while other programs used 1.2 cores")
    assert measure._source(0.1).startswith("measured 2")
    assert "other" not in measure._source(0.1)


def test_the_load_of_others_is_a_number_of_cores() -> None:
    others = machine.OtherLoad()
    sum(range(100_000))
    assert 0 <= others.cores() < 10_000


# --------------------------------------------------------------------------------------------------------------- disk


def test_a_checkpoint_is_read_and_nothing_written_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_weights(write_weights(tmp_path / "model", 70 * KIB, "a.safetensors"), 90 * KIB + 17, "b.safetensors")
    monkeypatch.setattr(disk, "_test_file", interrupt)
    with disk.files_to_read(folder, TINY) as files:
        assert [file.name for file in files] == ["a.safetensors", "b.safetensors"]
    speed = disk.measure_disk(folder, TINY)
    assert speed.bytes_per_second > 0
    assert speed.cpu_seconds_per_byte >= 0
    assert sorted(file.name for file in folder.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_beside_a_small_checkpoint_the_test_file_lies_elsewhere(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "model", 10 * KIB)
    with disk.files_to_read(folder, TINY) as (file,):
        assert file.parent == tmp_path
        assert file.stat().st_size == TINY.file_bytes
        assert file.stat().st_dev == folder.stat().st_dev
    assert not file.exists()


def test_reads_land_in_place_in_whole_pages(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "model", 200 * KIB + 5)
    pieces = disk._pieces([folder / "model.safetensors"], TINY)
    assert 0 <= sum(piece.nbytes for piece in pieces) - TINY.disk_bytes < TINY.ring_bytes
    assert all(piece.offset % 4096 == piece.nbytes % 4096 == piece.target == 0 for piece in pieces)
    assert all(piece.nbytes <= TINY.ring_bytes for piece in pieces)
    assert {piece.offset + piece.nbytes for piece in pieces} >= {200 * KIB}


def test_a_large_checkpoint_is_not_read_to_the_end(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "model", 1000 * KIB)
    pieces = disk._pieces([folder / "model.safetensors"], TINY)
    assert sum(piece.nbytes for piece in pieces) == TINY.disk_bytes


def test_reading_ends_when_its_time_is_up(tmp_path: Path) -> None:
    effort = dataclasses.replace(TINY, disk_bytes=4 * GIB, disk_seconds=0.001, ring_bytes=MIB)
    folder = write_weights(tmp_path / "model", MIB)
    assert disk.measure_disk(folder, effort).bytes_per_second > 0


def test_what_is_done_meanwhile_is_counted_and_ends_with_the_reads(tmp_path: Path) -> None:
    folder, calls = write_weights(tmp_path / "model", MIB), []
    effort = dataclasses.replace(TINY, disk_bytes=64 * MIB, ring_bytes=MIB)
    speed = disk.read_files([folder / "model.safetensors"], effort, lambda: calls.append(time.sleep(0.001)))
    assert speed.calls_per_second > 0
    assert len(calls) <= speed.calls_per_second * 64 * MIB / speed.bytes_per_second + 1


@pytest.mark.parametrize(("rates", "expected"), [((2.0, 1.0), 0.5), ((2.0, 3.0), 1.0)])
def test_shares_are_of_both_at_once_over_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: tuple[float, float], expected: float
) -> None:
    """A disk that is faster beside other work, as it may seem to be, keeps all of its rate."""
    quiet, both = (disk.DiskSpeed(rate, 0.0, True, rate) for rate in rates)
    monkeypatch.setattr(overlap, "read_files", lambda _, __, meanwhile=None: both if meanwhile else quiet)
    monkeypatch.setattr(overlap, "seconds_per_call", lambda *_: 1 / rates[0])
    folder = write_weights(tmp_path / "model", 200 * KIB)
    assert overlap.measure_shares(folder, TINY, lambda: None) == overlap.Shares(expected, expected)


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["_read", "_fill", "Reader"])
def test_the_test_file_goes_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(disk, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        disk.measure_disk(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ReadError("reading failed")

    monkeypatch.setattr("airstream.transfer.files.WeightFile.read_into", fail)
    with pytest.raises(ReadError, match="reading failed"):
        disk.measure_disk(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def usage(free: int) -> Callable[[Any], Any]:
    return lambda _: namedtuple("usage", "total used free")(free, 0, free)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(free=TINY.file_bytes // 8))
    monkeypatch.setattr(disk, "_fill", interrupt)
    with pytest.raises(DiskSpaceError, match=r"16\.0 KiB are free"):
        disk.measure_disk(tmp_path, TINY)


def test_a_disk_that_is_nearly_full_gets_a_smaller_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(free=TINY.file_bytes))
    with disk.files_to_read(tmp_path, TINY) as (file,):
        assert file.stat().st_size == TINY.file_bytes // 2


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskSpaceError, match="No space left on device"):
        disk.measure_disk(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_nowhere_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ArgumentError, match="Name a folder on the same disk"):
        disk.measure_disk(tmp_path, TINY)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_only_folders_are_measured(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArgumentError, match=f"{name} is not a folder"):
        measure.measure(tmp_path / name, CPU, effort=TINY)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct reads here")
def test_refused_direct_reads_are_part_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.Reader, "direct", property(lambda _: False))
    assert measure.measure(tmp_path, CPU, effort=TINY).disk.source.endswith(
        "through the page cache, direct reads refused"
    )


# ------------------------------------------------------------------------------------------------------------ keeping


def test_what_is_kept_is_found_again(tmp_path: Path, cache: Path) -> None:
    assert store.stored(tmp_path, CPU) is None
    kept = facts(num_cores=3)
    assert store.save(tmp_path, CPU, kept) == cache / "hardware.json"
    assert store.stored(tmp_path, CPU) == kept == store.facts_for(tmp_path, CPU)
    store.save(tmp_path, CPU, facts(num_cores=4))
    assert store.stored(str(tmp_path), CPU) == facts(num_cores=4)
    assert len(json.loads((cache / "hardware.json").read_text())["machines"]) == 1


def test_each_key_is_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(tmp_path, CPU, facts(num_cores=1))
    with monkeypatch.context() as other:
        other.setattr(store, "machine_name", lambda _: "another machine")
        assert store.stored(tmp_path, CPU) is None
        store.save(tmp_path, CPU, facts(num_cores=2))
    assert store.stored(tmp_path, torch.device("meta")) is None
    assert store.stored(tmp_path, CPU) == facts(num_cores=1)


def test_the_weights_decide_which_disk_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system")
    (folder / "model.safetensors").symlink_to(elsewhere)
    assert store._key(folder, CPU)["file_system"] == f"{elsewhere.stat().st_dev:x}"


def test_another_disk_of_the_same_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = facts(disk=Rate(5e9, "measured 2026-11-25"), host_copy=Rate(7e9, "measured 2026-11-25"))
    with monkeypatch.context() as other:
        other.setattr(
            store, "_key", lambda *_: {"machine": machine.machine_name(CPU), "device": "cpu", "file_system": "?"}
        )
        store.save(tmp_path, CPU, kept)
    found = store.facts_for(tmp_path, CPU)
    assert found.host_copy == kept.host_copy
    assert found.disk.source.startswith("assumed")
    assert store.stored(tmp_path, CPU) is None


def test_without_a_measurement_it_is_assumed(tmp_path: Path) -> None:
    found = store.facts_for(tmp_path / "not there", CPU)
    assert found == assumed("cpu", machine.machine_name(CPU), machine.usable_cores())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\xff",
        '{"format": 1}',
        '{"format": 99, "machines": []}',
        '{"format": 1, "machines": [1, null, {}]}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_counts_as_nothing(tmp_path: Path, cache: Path, text: str) -> None:
    (cache / "hardware.json").write_text(text, encoding="latin-1")
    assert store.stored(tmp_path, CPU) is None
    assert store.facts_for(tmp_path, CPU).disk.source.startswith("assumed")
    store.save(tmp_path, CPU, facts(num_cores=9))
    assert store.stored(tmp_path, CPU) == facts(num_cores=9)


@pytest.mark.parametrize(
    "damage",
    [
        {"facts": None},
        {"facts": {}},
        {"facts": {"disk": 5}},
        {"facts": assumed("cpu").to_dict() | {"disk": {"per_second": -1, "source": "x"}}},
        {"facts": assumed("cpu").to_dict() | {"weights": {}}},
        {"facts": assumed("cpu").to_dict() | {"weights": 3}},
        {"facts": assumed("cpu").to_dict() | {"num_cores": "x"}},
        {"facts": assumed("cpu").to_dict() | {"disk": {"per_second": 5, "source": 7}}},
        {"facts": assumed("cpu").to_dict() | {"of a later version": 1}},
    ],
)
def test_a_damaged_entry_counts_as_nothing(tmp_path: Path, cache: Path, damage: dict[str, Any]) -> None:
    store.save(tmp_path, CPU, facts())
    data = json.loads((cache / "hardware.json").read_text())
    data["machines"][0] |= damage
    (cache / "hardware.json").write_text(json.dumps(data))
    assert store.stored(tmp_path, CPU) is None
    assert store.facts_for(tmp_path, CPU).disk.source.startswith("assumed")


def test_a_cache_that_is_no_folder_disturbs_no_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "file"))
    assert store.stored(tmp_path, CPU) is None
    assert not store.facts_for(tmp_path, CPU).disk.is_measured
    with pytest.raises(OSError, match="file"):
        store.save(tmp_path, CPU, facts())


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_write_that_breaks_off_leaves_the_old_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store.save(tmp_path, CPU, facts(num_cores=1))
    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(tmp_path, CPU, facts(num_cores=2))
    assert store.stored(tmp_path, CPU) == facts(num_cores=1)
    assert {file.name for file in cache.iterdir()} == {"hardware.json", ".hardware.json.lock"}


KILLED = (
    "import os, signal, sys, torch; from airstream.rates import saved as store\n"
    "from airstream.rates.facts import assumed\n"
    "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
    "store.save(sys.argv[1], torch.device('cpu'), assumed('cpu'))"
)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_what_a_killed_process_was_writing_is_written_over(tmp_path: Path, cache: Path) -> None:
    store.save(tmp_path, CPU, facts(num_cores=1))
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -9
        assert store.stored(tmp_path, CPU) == facts(num_cores=1)
    left = {file.name for file in cache.iterdir()}
    assert len(left) == 3, f"else nothing was left behind, or more each time: {left}"
    store.save(tmp_path, CPU, facts(num_cores=2))
    assert store.stored(tmp_path, CPU) == facts(num_cores=2)
    assert {file.name for file in cache.iterdir()} == {"hardware.json", ".hardware.json.lock"}


def test_a_link_in_the_cache_is_followed_and_a_pipe_is_left(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(exist_ok=True)
    link, elsewhere = cache / "hardware.json", tmp_path / "elsewhere.json"
    link.symlink_to(elsewhere)
    store.save(tmp_path, CPU, facts())
    assert link.is_symlink()
    assert store.stored(tmp_path, CPU) == facts()
    elsewhere.unlink()
    os.mkfifo(elsewhere)
    with pytest.raises(OSError, match="it is a pipe"):
        store.save(tmp_path, CPU, facts())
    assert elsewhere.is_fifo()


def test_a_save_that_waits_for_another_one_too_long_says_so(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    with FileLock(cache / ".hardware.json.lock"), pytest.raises(OSError, match="lock"):
        store.save(tmp_path, CPU, facts())


@pytest.mark.parametrize("field", [*store.KEY, "facts", "measured"])
@pytest.mark.parametrize("value", ["gone", None, 7, [], {}, [[]], {"a": 1}], ids=str)
def test_no_entry_of_the_file_disturbs_a_reader(tmp_path: Path, cache: Path, field: str, value: Any) -> None:
    store.save(tmp_path, CPU, facts())
    data = json.loads((cache / "hardware.json").read_text())
    bad = {key: old for key, old in data["machines"][0].items() if key != field or value != "gone"}
    data["machines"].insert(0, bad | ({} if value == "gone" else {field: value}))
    (cache / "hardware.json").write_text(json.dumps(data))
    if field != "facts":
        assert store.stored(tmp_path, CPU) == facts()
    str(store.facts_for(tmp_path, CPU))
    str(store.facts_for(tmp_path / "elsewhere", CPU))
    str(store.facts_for(tmp_path, torch.device("cuda", 0)))


PLACES = [(), ("disk",), ("weights",), ("weights", "float32"), ("flops",)]


@settings(max_examples=100, deadline=None)
@example(place=(), name="layer_seconds", value=1e308)
@given(
    place=st.sampled_from(PLACES),
    name=st.sampled_from([*(field.name for field in dataclasses.fields(HardwareFacts)), "per_second", "source", "x"]),
    value=st.sampled_from([None, 7, -1, 0, 10**99, 1e308, "x", "", [], {}, True, float("nan"), float("inf"), [[1]]]),
)
def test_facts_of_any_kind_are_read_or_count_as_nothing(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str, ...], name: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("rates")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRSTREAM_CACHE", str(folder))
        store.save(folder, CPU, facts())
        data = json.loads((folder / "hardware.json").read_text())
        inside = data["machines"][0]["facts"]
        for key in place:
            inside = inside[key]
        inside[name] = value
        (folder / "hardware.json").write_text(json.dumps(data))
        found = store.facts_for(folder, CPU)
    assert str(found)
    assert found.disk.is_measured in (True, False)
    for dtype in ("float32", "bfloat16"):
        assert found.weights_rate(dtype).per_second > 0
        assert found.flops_rate(dtype).per_second > 0


def test_a_machine_is_known_by_what_it_is_not_by_its_name() -> None:
    name = machine.machine_name(CPU)
    assert f"{machine.usable_cores()} cores" in name
    assert "GiB" in name
    assert os.uname().nodename not in name if hasattr(os, "uname") else True


# -------------------------------------------------------------------------------------------------------------- cards

EVERY_CARD = pytest.mark.parametrize("card", all_cards(), ids=lambda card: card.name)


@EVERY_CARD
def test_a_card_is_plausible(card: Card) -> None:
    assert 4 <= card.vram_gib <= 256
    assert card.pcie_generation in PCIE_X16_GBPS
    assert card.pcie_lanes in (8, 16)
    assert 100 <= card.bandwidth_gbps <= 10_000
    assert 4 <= card.fp32_tflops <= 200
    for peak in (card.fp16_tflops, card.bf16_tflops, card.int8_tops):
        assert peak is None or card.fp32_tflops < peak < 3000
    if card.bf16_tflops is not None:
        assert card.bf16_tflops == card.fp16_tflops
    assert len(card.source) > 10


@EVERY_CARD
def test_matrix_units_are_a_known_multiple_of_the_rest(card: Card) -> None:
    """A number that is "with sparsity", or adds up in float16, is another multiple.

    Of GeForce cards since Ampere, float16 is twice float32; of the workstation cards beside them, four times. int8 is
    four times and twice float16.
    """
    if card.name.startswith(("RTX 3", "RTX 4", "RTX 5")):
        assert card.fp16_tflops == pytest.approx(2 * card.fp32_tflops, rel=0.01)
        assert card.int8_tops == pytest.approx(4 * card.fp16_tflops, rel=0.01)
    elif card.name.startswith(("RTX A", "RTX 6000 Ada", "L4", "A10 ")) or card.name == "A10":
        assert card.fp16_tflops == pytest.approx(4 * card.fp32_tflops, rel=0.02)
        assert card.int8_tops == pytest.approx(2 * card.fp16_tflops, rel=0.02)
    elif card.int8_tops is not None and card.bf16_tflops is not None and not card.name.startswith("MI2"):
        assert card.int8_tops == pytest.approx(2 * card.fp16_tflops, rel=0.01)


@EVERY_CARD
def test_every_card_is_found_by_each_of_its_names(card: Card) -> None:
    for name in (card.name, *card.aliases):
        for spelling in (name, name.lower(), f"NVIDIA GeForce {name}", name.replace("GB", " GB")):
            assert find_card(spelling) is card


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("3090", "RTX 3090"),
        ("nvidia geforce rtx 3090", "RTX 3090"),
        ("RTX3090Ti", "RTX 3090 Ti"),
        ("3090 24 GiB", "RTX 3090"),
        ("gtx 1060", "GTX 1060 6GB"),
        ("3060", "RTX 3060 12GB"),
        ("4060", "RTX 4060"),
        ("4070tisuper", "RTX 4070 Ti Super"),
        ("7900xtx", "RX 7900 XTX"),
        ("Intel(R) Arc(TM) A770 Graphics", "Arc A770 16GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 SXM 16GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_names_are_taken_forgivingly(spelling: str, name: str) -> None:
    assert find_card(spelling).name == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("4070 Ti", "did you mean RTX 4070 or RTX 4070 Ti Super"),
        ("RTX 3060 Ti", "did you mean RTX 3060 12GB"),
        ("RTX 3060 Laptop GPU", "did you mean RTX 3060 12GB"),
        ("3080 12GB", "did you mean RTX 3080 10GB"),
        ("A100", "may be A100 PCIe 40GB, A100 PCIe 80GB, A100 SXM 40GB or A100 SXM 80GB"),
        ("H100", "may be H100 PCIe or H100 SXM"),
        ("4O90", "did you mean"),
        ("RTX 9999", "there is of RTX 3090, "),
        ("GTX 1650", 'Name the one that is most like it, and give the memory of yours: max_memory={0: "4GiB"} ('),
        ("MI999", "there is of MI210, MI300X, "),
        ("", "there is of GTX 1060 6GB, "),
        ("nvidia", "there is of GTX 1060 6GB, "),
    ],
)
def test_a_card_that_is_not_there_is_not_guessed(name: str, hint: str) -> None:
    with pytest.raises(ArgumentError) as refusal:
        find_card(name)
    assert hint in str(refusal.value)


@EVERY_CARD
def test_facts_of_a_card(card: Card) -> None:
    found = card_facts(card, num_cores=8)
    assert found.num_cores == 8
    assert card.name in found.machine
    assert all(rate.source.startswith(f"data sheet: {card.name}") for rate in found.weights.values())
    assert found.weights_rate("bfloat16").per_second < card.bandwidth_gbps * 1e9
    assert found.flops_rate("float32").per_second < card.fp32_tflops * 1e12
    assert found.flops_rate("float16").per_second >= found.flops_rate("bfloat16").per_second
    assert found.h2d is not None
    assert found.h2d.per_second == PCIE_X16_GBPS[card.pcie_generation] * 1e9 * card.pcie_lanes / 16
    assert HardwareFacts.from_json(found.to_json()) == found


def test_a_slot_can_be_older_and_narrower_than_the_card() -> None:
    def link(**slot: int) -> tuple[float, str]:
        found = card_facts("RTX 3090", **slot).h2d
        assert found is not None
        return found.per_second / 1e9, found.source

    assert link() == (25.5, "data sheet: RTX 3090, PCIe 4 x16")
    assert link(pcie_generation=5) == link()
    assert link(pcie_generation=3) == (12.5, "data sheet: RTX 3090, PCIe 3 x16")
    assert link(pcie_generation=3, pcie_lanes=4) == (3.125, "data sheet: RTX 3090, PCIe 3 x4")
    for wrong in ({"pcie_generation": 2}, {"pcie_lanes": 3}):
        with pytest.raises(ArgumentError, match=r"use generation 3, 4 or 5"):
            link(**wrong)


def test_a_disk_that_is_given() -> None:
    assert card_facts("4090").disk.source.startswith("assumed")
    assert card_facts("4090", disk_gbps=7).disk == Rate(7e9, "given")
    with pytest.raises(ArgumentError):
        card_facts("4090", disk_gbps=0)


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measuring takes next to nothing. The list grows with each time it happens."""
    calls: list[int] = []
    monkeypatch.setattr(measure, "_effort_for", lambda _: calls.append(1) or TINY)
    return calls


def run(*words: Any) -> int:
    return main(["hardware", *map(str, words), "--device", "cpu"])


def test_it_is_measured_once(tmp_path: Path, cache: Path, quick: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    first = capsys.readouterr()
    assert first.err.splitlines() == [
        "measuring the disk ...",
        "measuring memory ...",
        "measuring arithmetic on cpu ...",
        "measuring the disk and the processor at once ...",
    ]
    assert str(store.stored(tmp_path, CPU)) in first.out
    assert f"kept in {cache / 'hardware.json'}" in first.out
    assert re.search(r"unpacking, each core +bf16x12 \d+\.\d, .*MXFP4 \d+\.\d GB/s of bfloat16\n", first.out)
    assert run(tmp_path) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert not again.err
    assert len(quick) == 1
    assert run(tmp_path, "--refresh") == 0
    assert len(quick) == 2


def test_json_is_all_there_is_on_standard_output(
    tmp_path: Path, quick: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--json") == 0
    assert HardwareFacts.from_json(capsys.readouterr().out) == store.stored(tmp_path, CPU)


def test_by_default_it_is_this_folder(tmp_path: Path, quick: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run() == 0
    assert store.stored(tmp_path, CPU) is not None


def test_what_cannot_be_kept_is_shown_all_the_same(
    tmp_path: Path, quick: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "file"))
    assert run(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "every layer besides" in printed
    assert "not kept: " in printed


def test_an_error_is_one_line(tmp_path: Path, quick: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "missing") == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_showing_what_is_kept_needs_no_transformers(tmp_path: Path) -> None:
    """Which take seconds to import."""
    store.save(tmp_path, CPU, facts())
    code = (
        "import sys; from airstream.cli import main; "
        f"main(['hardware', {str(tmp_path)!r}, '--device', 'cpu']); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
