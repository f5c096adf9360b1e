"""Groups that stay on an accelerator share allocations: the plan counts what is allocated, however it came to that."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from airstream.plan import sharing
from airstream.reporting.units import KIB
from tests.conftest import (
    STREAMING,
    Resident,
    WriteTiny,
    cache_in,
    least_memory,
    on_accelerator,
    simulated_accelerator,
    stream,
)
from tests.stand_ins.comparing import FP32, logits, prompts
from tests.stand_ins.sim import SimRuntime
from tests.stand_ins.tiny_models import VOCAB_SIZE


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of everything that is allocated on the device, in order. Allocations and their steps are small."""
    sizes: list[int] = []
    empty = SimRuntime.empty

    def counting(runtime: SimRuntime, nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return empty(runtime, nbytes)

    monkeypatch.setattr(SimRuntime, "empty", counting)
    monkeypatch.setattr(sharing, "SHARED_BYTES", 100 * KIB)
    monkeypatch.setattr(sharing, "LARGE_BYTES", 1)
    monkeypatch.setattr(sharing, "STEP_BYTES", 16 * KIB)
    return sizes


def assert_planned(model: Any, allocated: list[int]) -> int:
    """That what stays takes what is planned, in allocations that were made; how many there are."""
    store, items = model._engine._store, model.plan.tiers["0"].items
    sizes = [sum(store._resident[names].memory.nbytes for names in together) for together in store._shared]
    assert {*chain.from_iterable(store._shared)} | {(name,) for name in model.plan.tables} == store._resident.keys()
    assert sum(sizes) + sum(model.plan.tables.values()) == model.plan.resident_bytes
    assert sum(map(sharing.in_steps, sizes)) - sum(sizes) == items["rounding"]
    assert set(sizes) <= set(allocated)
    return len(sizes)


def test_what_is_allocated_is_planned_when_plans_change(
    tiny: WriteTiny, resident: Resident, allocated: list[int]
) -> None:
    """A long generation takes room from what stays: only the allocations that change are read again."""
    folder, reference = tiny("llama", FP32), on_accelerator(resident("llama", FP32, FP32))
    options = STREAMING | {"max_batch_size": 1, "max_context": None}
    with simulated_accelerator() as sim:
        least = least_memory(folder, "sim:0", **options)
        memory = least | {0: least[0] + 260 * KIB}
        numbers, num_kept = [], []
        with stream(folder, "sim:0", **options, max_memory=memory) as model:
            before: dict[Any, Any] = {}
            cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
            for step in range(20):
                ids = torch.randint(3, VOCAB_SIZE, (1, 16), generator=torch.Generator().manual_seed(step))
                output = model(ids.to(model.device), logits_to_keep=1, **cache_in(model, cache))
                expected = reference(ids, logits_to_keep=1, **cache_in(model, other))
                assert torch.equal(output.logits.cpu(), expected.logits)
                assert model.plan.tiers["0"].peak_bytes <= memory[0]
                assert_planned(model, allocated)
                now = dict(model._engine._store._resident)
                numbers.append(len(now))
                num_kept.append(sum(before.get(names) is held for names, held in now.items()))
                before = now
            del cache, output
            assert torch.equal(logits(model, prompts(1, 12)), logits(reference, prompts(1, 12)))
            assert assert_planned(model, allocated) < len(model._engine._store._resident) == numbers[0]
        changes = [step for step in range(1, len(numbers)) if numbers[step] < numbers[step - 1]]
        assert changes
        assert all(num_kept[step] > 0 for step in changes), "what comes first stays where it is"
        assert sim.races == []
