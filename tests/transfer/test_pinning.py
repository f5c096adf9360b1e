"""Pinning host memory takes time; nobody waits for it, and once it is done there is no more of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from airstream.reporting.probe import HOST_COPY
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.pinning import Pinner, Pinning
from tests.conftest import WriteTiny, simulated_accelerator, stream
from tests.stand_ins.sim import SimDevice, SimRuntime

IDS = torch.arange(3, 12)[None]
PATIENCE = 10.0


class Gate:
    """Pins nothing for a model before it is opened, and then whatever waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.was_waited_for = False
        real = SimRuntime.pin

        def pin(runtime: SimRuntime, buffer: HostBuffer) -> bool:
            if threading.current_thread() is not threading.main_thread():  # which pins staging buffers while it loads
                self.reached.set()
                if not self.opened.wait(PATIENCE):
                    self.was_waited_for = True
                    self.opened.set()  # once is enough
            return real(runtime, buffer)

        monkeypatch.setattr(SimRuntime, "pin", pin)


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", torch.bfloat16)


@pytest.fixture
def expected(folder: Path) -> torch.Tensor:
    with simulated_accelerator(), stream(folder, "sim:0") as model:
        return logits_of(model)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def hosting(folder: Path) -> Any:
    """A model on `sim:0` that streams from host memory."""
    with stream(folder, "sim:0") as model:
        least = dict(model.plan.peak_bytes)
    return stream(folder, "sim:0", max_memory={0: least["0"], "cpu": "1GiB"})


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to("sim:0")).logits.cpu()


def test_no_pass_waits_for_memory_to_be_pinned(folder: Path, expected: torch.Tensor, gate: Gate) -> None:
    """The first passes take another way to the device, and later ones the short one."""
    with simulated_accelerator() as sim, hosting(folder) as model:
        for _ in range(3):
            assert torch.equal(logits_of(model), expected)
        assert gate.reached.is_set()
        assert not gate.was_waited_for
        assert not gate.opened.is_set()
        with model.profile() as before:
            logits_of(model)
        assert before.total.links[HOST_COPY].nbytes > 0
        gate.opened.set()
        model._engine.machinery.backend.wait_pinned()
        logits_of(model)  # the last that was read ahead the long way
        with model.profile() as after:
            assert torch.equal(logits_of(model), expected)
        assert not after.total.links[HOST_COPY].nbytes
        assert not sim.races


def test_pinning_begins_with_the_first_pass_and_is_never_again(folder: Path) -> None:
    with simulated_accelerator(pin_bytes_per_second=50e6) as sim, hosting(folder) as model:
        loaded = len([name for name, *_ in sim.pins if name == "MainThread"])
        logits_of(model)
        model._engine.machinery.backend.wait_pinned()
        count = len(sim.pins)
        pinned = [nbytes for name, *_, nbytes in sim.pins if name == "airstream-pinning"]
        assert sum(pinned) >= model.plan.hosted_bytes
        assert len(pinned) + loaded == count, "another thread than its own pins"
        for _ in range(4):
            logits_of(model)
        model._engine.machinery.backend.wait_pinned()
        assert len(sim.pins) == count, "memory was pinned in the token loop"
        assert all(thread.name != "airstream-pinning" for thread in threading.enumerate())
    assert sim.pinned_bytes == 0


def test_measuring_the_link_waits_for_it(folder: Path) -> None:
    with simulated_accelerator(pin_bytes_per_second=5e6) as sim, hosting(folder) as model:
        model.measure_link()
        assert sum(nbytes for name, *_, nbytes in sim.pins if name == "airstream-pinning") >= model.plan.hosted_bytes


def test_a_model_can_be_closed_in_the_middle(folder: Path, gate: Gate) -> None:
    with simulated_accelerator() as sim:
        model = hosting(folder)
        logits_of(model)
        assert gate.reached.wait(PATIENCE)
        closing = threading.Thread(target=model.close)
        closing.start()
        time.sleep(0.05)
        assert closing.is_alive(), "memory was given back while it was being pinned"
        gate.opened.set()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        assert sim.pinned_bytes == 0
        assert all(thread.name != "airstream-pinning" for thread in threading.enumerate())


def test_where_it_is_refused_somebody_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "airstream"),
        simulated_accelerator(is_pinnable=False),
        hosting(folder) as model,
    ):
        logits_of(model)
        model._engine.machinery.backend.wait_pinned()
    assert len([record for record in caplog.records if "weights could not be pinned" in record.message]) == 1


def test_what_was_given_back_is_not_pinned() -> None:
    with SimDevice() as sim:
        pinner, pinnings = Pinner(), [Pinning(SimRuntime(sim), HostBuffer(4096)) for _ in range(3)]
        pinnings[1].undo()
        for pinning in pinnings:
            pinner.submit(pinning)
        pinner.wait()
        assert [pinning.is_pinned for pinning in pinnings] == [True, False, True]
        for _ in range(2):
            for pinning in pinnings:
                pinning.undo()
        assert sim.pinned_bytes == 0
        pinner.close()
        pinner.close()
