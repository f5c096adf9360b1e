"""The code that drives CUDA, on the simulated accelerator: right as it is, and caught if an order is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from airstream.transfer.accelerator import AcceleratorBackend
from tests.conftest import WriteTiny, simulated_accelerator, stream
from tests.stand_ins.sim import RaceError, SimDevice

IDS = torch.arange(3, 12)[None]
OPTIONS: dict[str, Any] = {"layers_per_batch": 1, "prefetch_batches": 1}


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", torch.bfloat16)


@pytest.fixture
def planted() -> Iterator[SimDevice]:
    """A simulated accelerator that notes races and goes on, so that the threads of a broken backend can be ended."""
    with pytest.raises(RaceError), simulated_accelerator(raise_races=False) as device:
        yield device


def generate(folder: Path) -> torch.Tensor:
    with stream(folder, "sim:0", **OPTIONS) as model:
        return model.generate(IDS.to("sim:0"), max_new_tokens=6, do_sample=False).cpu()


def test_nothing_races_and_the_tokens_are_right(folder: Path, sim: SimDevice) -> None:
    with stream(folder, **OPTIONS) as model:
        expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(generate(folder), expected)
    assert not sim.races


@pytest.mark.parametrize(
    ("method", "bug"),
    [
        ("wait_filled", "computation does not wait for the copies that fill its slab"),
        ("begin_fill", "copies do not wait for the computation that still reads what they overwrite"),
        ("mark_computed", "the end of a computation is not marked, so that there is nothing to wait for"),
        ("end_fill", "the end of the copies is not marked"),
    ],
)
def test_an_order_left_out_is_caught(
    folder: Path, planted: SimDevice, monkeypatch: pytest.MonkeyPatch, method: str, bug: str
) -> None:
    monkeypatch.setattr(AcceleratorBackend, method, lambda *_: None)
    generate(folder)
    assert planted.races, bug


def test_device_memory_is_what_was_planned_and_comes_back(folder: Path) -> None:
    with simulated_accelerator() as device:
        with stream(folder, "sim:0", **OPTIONS) as model:
            model.generate(IDS.to("sim:0"), max_new_tokens=6, do_sample=False)
            assert 0 < device.peak_bytes <= model.plan.tiers["0"].peak_bytes
        del model
        assert device.allocated_bytes == 0
