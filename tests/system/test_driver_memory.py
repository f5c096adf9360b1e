"""What an accelerator's driver and libraries take of host memory has a line in the plan, and is held to the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from airstream import AutoModel, BudgetError
from airstream.loading.machine import Machine
from airstream.plan.request import HOST
from airstream.reporting.units import MIB
from airstream.system import memory as hardware
from tests.conftest import WriteTiny, simulated_accelerator, stream

LINE = "device driver"


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", torch.bfloat16)


class Driver:
    """Takes host memory when the device is first used: `process_bytes` as it would be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, later: int) -> None:
        self.first = first
        self.calls = 0
        monkeypatch.setattr(hardware, "LIBRARY_BYTES", {"sim": later})
        monkeypatch.setattr(hardware, "process_bytes", self.process_bytes)

    def process_bytes(self) -> int:
        self.calls += 1
        return 1000 * MIB + (self.first if self.calls > 1 else 0)


@pytest.mark.parametrize(
    ("first", "planned"),
    [(300 * MIB, 400 * MIB), (0, 100 * MIB), (1 * MIB, 100 * MIB)],
    ids=["brought up now", "in use already", "noise"],
)
def test_what_is_not_known_is_measured(folder: Path, first: int, planned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_accelerator():
        without = AutoModel.plan(folder, device="sim:0", max_memory={0: "1GiB", "cpu": "2GiB"})
        driver = Driver(monkeypatch, first, later=100 * MIB)
        plan = AutoModel.plan(folder, device="sim:0", max_memory={0: "1GiB", "cpu": "2GiB"})
    assert driver.calls == 2
    assert LINE not in without.tiers[HOST].items
    assert plan.tiers[HOST].items[LINE] == planned
    assert LINE not in plan.tiers["0"].items
    assert plan.peak_bytes[HOST] - without.peak_bytes[HOST] == planned
    assert LINE in str(plan)


def test_a_budget_that_cannot_hold_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_accelerator():
        with stream(folder, "sim:0") as model:
            fits: dict[Any, int] = {0: model.plan.peak_bytes["0"], "cpu": model.plan.peak_bytes[HOST]}
        Driver(monkeypatch, 0, later=100 * MIB)
        with pytest.raises(BudgetError, match=f"{LINE} 100 MiB"):
            stream(folder, "sim:0", max_memory=fits)
        fits["cpu"] += 100 * MIB
        with stream(folder, "sim:0", max_memory=fits) as model:
            assert model.plan.tiers[HOST].items[LINE] == 100 * MIB


def test_a_card_that_is_only_described_has_the_default(folder: Path) -> None:
    plan = AutoModel.plan(folder, machine=Machine(gpu="RTX 3090", ram="64GiB"))
    assert plan.tiers[HOST].items[LINE] == hardware.LIBRARY_BYTES["cuda"]


def test_a_cpu_has_none(folder: Path) -> None:
    assert LINE not in AutoModel.plan(folder, device="cpu").tiers[HOST].items
