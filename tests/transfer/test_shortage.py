"""A machine with less memory than was planned for: one error, wherever memory is refused, and nothing left behind."""

from __future__ import annotations

import errno
import gc
import mmap
import re
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from airstream import AutoModel, BudgetError
from airstream.errors import ReadError
from airstream.reporting.units import parse_bytes
from airstream.transfer import host_memory
from airstream.transfer.accelerator import AcceleratorBackend
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.shortage import shortage_in
from tests.conftest import STREAMING, WriteTiny, least_memory, simulated_accelerator, stream
from tests.stand_ins.limits import fail_from_within
from tests.stand_ins.process import descriptors
from tests.stand_ins.sim import SimDevice, SimRuntime

IDS = torch.arange(3, 12)[None]
LONG_IDS = torch.arange(3, 203)[None] % 90


class Machine:
    """Refuses memory from the allocation `refuses_from` on, and keeps an eye on what it has given.

    Attributes:
        asked: bytes of every allocation so far.
        refused: bytes of those that were refused.
        has_refused_main: one of them was asked for by the main thread.
        given: host memory that is still there.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuses_from: int | None = None
        self.forget()
        self._map = host_memory._map
        self._empty = SimRuntime.empty
        monkeypatch.setattr(host_memory, "_map", self.map)
        monkeypatch.setattr(SimRuntime, "empty", lambda runtime, nbytes: self.empty(runtime, nbytes))

    def forget(self) -> None:
        self.asked: list[int] = []
        self.refused: list[int] = []
        self.has_refused_main = False
        self.given: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def map(self, nbytes: int) -> tuple[mmap.mmap, int]:
        if self._refuses(nbytes):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        mapping, start = self._map(nbytes)
        self.given.add(mapping)
        return mapping, start

    def empty(self, runtime: SimRuntime, nbytes: int) -> torch.Tensor:
        if self._refuses(nbytes):
            raise torch.OutOfMemoryError("sim:0 has not so much")
        return self._empty(runtime, nbytes)

    def _refuses(self, nbytes: int) -> bool:
        if not nbytes:
            return False  # a ring of nothing takes nothing
        self.asked.append(nbytes)
        refuses = self.refuses_from is not None and len(self.asked) > self.refuses_from
        if refuses:
            self.refused.append(nbytes)
            self.has_refused_main |= threading.current_thread() is threading.main_thread()
        return refuses


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[SimDevice | None]:
    if request.param == "cpu":
        yield None
    else:
        with simulated_accelerator() as device:
            yield device


# What else is asked for, the input, and how much room there is beside what is needed at least.
CASES: dict[str, tuple[str, dict[str, Any], torch.Tensor]] = {
    "cpu, all streamed": ("cpu", {}, IDS),
    "cpu, all resident": ("cpu", {"max_memory": "1GiB"}, IDS),
    "cpu, through staging buffers": ("cpu", {"dtype": "float32"}, IDS),
    "cpu, another plan for a long prompt": ("cpu", {"max_context": 16}, LONG_IDS),
    "accelerator, all streamed": ("sim:0", {}, IDS),
    "accelerator, all resident": ("sim:0", {"max_memory": {0: "1GiB", "cpu": "1GiB"}}, IDS),
    "accelerator, weights in host memory": ("sim:0", {"max_memory": {"cpu": "1GiB"}}, IDS),
    "accelerator, another plan for a long prompt": ("sim:0", {"max_context": 16}, LONG_IDS),
}


def options_of(folder: Path, device: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, with the least memory for a long context where none is."""
    least = least_memory(folder, device, **(STREAMING | given | {"max_context": 256, "max_memory": None}))
    memory = given.get("max_memory", {})
    return given | {"max_memory": least | memory if isinstance(memory, dict) else memory}


@pytest.mark.parametrize(("device", "given", "ids"), CASES.values(), ids=CASES, indirect=["device"])
def test_memory_that_is_refused_is_one_error_and_leaves_nothing(
    tiny: WriteTiny,
    machine: Machine,
    device: SimDevice | None,
    given: dict[str, Any],
    ids: torch.Tensor,
) -> None:
    folder, where = tiny("llama", torch.bfloat16), "cpu" if device is None else "sim:0"
    options = options_of(folder, where, given)
    machine.forget()
    with stream(folder, where, **options) as model:
        expected = model(ids.to(where)).logits.cpu()
    del model
    for number in in_turn(len(machine.asked)):
        machine.refuses_from = number
        machine.forget()
        error = attempt(folder, where, options, ids, expected)
        if error is not None:
            check(str(error), machine)
        assert error is not None or not machine.has_refused_main, "only reader threads can do without"
        assert_nothing_is_left(folder, machine)
        del error  # its traceback has the frames of whoever loaded the model
        gc.collect()
        assert not machine.given
        assert device is None or (device.pinned_bytes, device.allocated_bytes) == (0, 0)


def in_turn(number: int) -> list[int]:
    """The allocations to refuse: the first and the last ones, and of the many groups of weights between them some."""
    assert number >= 2
    return sorted({*range(min(number, 3)), *range(3, number, max(number // 4, 1)), number - 1})


def attempt(
    folder: Path, where: str, options: dict[str, Any], ids: torch.Tensor, expected: torch.Tensor
) -> BudgetError | None:
    """What is said if it does not work."""
    try:
        model = stream(folder, where, **options)
    except BudgetError as error:
        return error  # with its traceback, as a notebook keeps it
    with model:
        try:
            assert torch.equal(model(ids.to(where)).logits.cpu(), expected)
        except BudgetError as error:
            return BudgetError(str(error))  # without the way to the model, which is the caller's to keep
    return None


def check(message: str, machine: Machine) -> None:
    asked = re.match(r"(\S+ \S+) of (host memory|memory of device 0|device memory) could not be allocated", message)
    assert asked, message
    nbytes = parse_bytes(asked[1])
    assert any(0.99 * nbytes <= refused < 1.01 * nbytes + PAGE_BYTES for refused in machine.refused), message
    assert "smaller max_memory" in message


def assert_nothing_is_left(folder: Path, machine: Machine) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(each.name.startswith("airstream-") for each in threading.enumerate()):
        time.sleep(0.01)
    gc.collect()
    assert [each.name for each in threading.enumerate() if each.name.startswith("airstream-")] == []
    assert descriptors(folder) == []


def test_a_backend_without_room_for_packed_weights_unpins_its_buffers() -> None:
    with simulated_accelerator(memory_limit=1 << 12) as device:
        with pytest.raises(BudgetError, match=r"68.0 KiB of device memory could not be allocated"):
            AcceleratorBackend(SimRuntime(device), 2, 1 << 16, packed=True)
        assert device.pins
        assert (device.pinned_bytes, device.allocated_bytes) == (0, 0)


def test_the_message_has_the_plan_and_the_remedy(tiny: WriteTiny, machine: Machine) -> None:
    machine.refuses_from = 0
    with pytest.raises(BudgetError) as refusal:
        AutoModel.from_pretrained(tiny("llama", torch.bfloat16), device="cpu", max_memory="64GiB", max_context=64)
    pattern = (
        r".+ of host memory could not be allocated: there is not so much\. The plan takes .+ of it in all, within the "
        r"64\.00 GiB of max_memory \(given(, more than the .+ available)?\), and .+ are free now\. "
        r'Load the model with a smaller max_memory=\{"cpu": \.\.\.\}, below .+, or end what else uses that memory'
    )
    assert re.fullmatch(pattern, str(refusal.value)), refusal.value


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "some more"),
        (MemoryError(), "some more"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.00 GiB"),
        (RuntimeError("CUDA error: out of memory"), "some more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: asked for 2147483648 bytes."),
            "2.00 GiB",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError(errno.EIO, "Input/output error"), None),
        (ReadError(errno.ENOMEM, "the disk failed"), None),
        (BudgetError("refused by the plan"), None),
    ],
    ids=str,
)
def test_what_tells_of_a_shortage(error: Exception, asked: str | None) -> None:
    shortage = shortage_in(error)
    assert (shortage.asked if shortage else None) == asked


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")], ids=str)
def test_memory_that_a_pass_does_not_get_is_the_same_error(tiny: WriteTiny, error: Exception) -> None:
    def fail(*_: object) -> None:
        fail_from_within(error)

    with simulated_accelerator(), stream(tiny("llama", torch.bfloat16), "sim:0") as model:
        expected = model(IDS.to("sim:0")).logits
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(BudgetError, match=r"could not be allocated: .* The plan takes .* smaller max_memory"):
            model(IDS.to("sim:0"))
        handle.remove()
        assert torch.equal(model(IDS.to("sim:0")).logits.cpu(), expected.cpu())
