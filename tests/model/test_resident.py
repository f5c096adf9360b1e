"""Weights that stay in memory: the same results whatever the budgets, no byte more than planned, none read twice."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from airstream import BudgetError
from airstream.model.absent import Absent
from airstream.model.row_table import RowTable
from airstream.plan.tiers import DEVICE_RUNTIME_BYTES
from airstream.transfer.reader import CHUNK_BYTES
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
from tests.stand_ins.limits import fail_from_within
from tests.stand_ins.sim import SimRuntime
from tests.stand_ins.tiny_models import VOCAB_SIZE

FP32 = torch.float32
NAMES = ("llama-sharded", "llama-tied", "qwen3_moe", "gemma3", "gpt2")
IDS = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(1))
PLENTY: dict[str, Any] = {"cpu": "1GiB"}
PLENTY_OF_BOTH: dict[Any, Any] = {0: "1GiB", "cpu": "1GiB"}


def with_more(memory: dict[Any, int], more: dict[Any, int]) -> dict[Any, int]:
    return {tier: nbytes + more.get(tier, 0) for tier, nbytes in memory.items()}


def greedy(model: Any, ids: torch.Tensor, new_tokens: int = 6) -> torch.Tensor:
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    return model.generate(ids.to(model.device), **options).cpu()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids.to(model.device)).logits.cpu()


def weights_of(model: Any) -> list[str]:
    """The names of the parameters that are in place."""
    absent = (Absent, RowTable)
    return [name for name, each in model.named_parameters() if not each.is_meta and not isinstance(each, absent)]


# ------------------------------------------------------------------------------------------------ whatever the budgets


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(NAMES),
    device=st.sampled_from(["cpu", "sim:0"]),
    shares=st.tuples(st.floats(0, 1.3), st.floats(0, 1.3)),
    layers_per_batch=st.integers(1, 3),
    prefetch_batches=st.sampled_from(["auto", 0, 1, 2, 3]),
    batch_size=st.integers(1, 3),
    is_pinnable=st.booleans(),
)
def test_results_are_the_same_and_memory_is_what_was_planned(
    tiny: WriteTiny,
    resident: Resident,
    name: str,
    device: str,
    shares: tuple[float, float],
    layers_per_batch: int,
    prefetch_batches: Any,
    batch_size: int,
    is_pinnable: bool,
) -> None:
    folder, reference = tiny(name, FP32), resident(name, FP32, FP32)
    weights = sum(parameter.nbytes for parameter in reference.parameters())
    options = STREAMING | {"layers_per_batch": layers_per_batch, "prefetch_batches": prefetch_batches}
    ids = IDS.expand(batch_size, -1)
    with ExitStack() as stack:
        if device == "sim:0":
            sim = stack.enter_context(simulated_accelerator(is_pinnable=is_pinnable))
            reference = on_accelerator(reference)
        least = least_memory(folder, device, **options)
        memory = with_more(least, {"cpu": int(shares[0] * weights), 0: int(shares[1] * weights)})
        model = stack.enter_context(stream(folder, device, **options, max_memory=memory))
        assert torch.equal(logits(model, ids), logits(reference, ids))
        assert torch.equal(greedy(model, ids, 3), greedy(reference, ids, 3))
        if device == "sim:0":
            planned = model.plan.tiers["0"].peak_bytes - DEVICE_RUNTIME_BYTES
            # What the runtime is planned for is not taken here; the bus was measured in it, before all else was there.
            assert sim.peak_bytes <= max(planned, min(CHUNK_BYTES, DEVICE_RUNTIME_BYTES))
            model.close()
            assert sim.races == []


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_reads_exactly_what_the_plan_says(tiny: WriteTiny, name: str) -> None:
    folder = tiny(name, FP32)
    least = least_memory(folder, **STREAMING)["cpu"]
    for more in (60_000, 300_000):
        with stream(folder, max_memory={"cpu": least + more}) as model:
            logits(model, IDS)
            model.stats.streamed_bytes = 0
            num_passes = 2
            for _ in range(num_passes):
                logits(model, IDS)
            ahead = model.plan.prefetch_batches * max(batch.read_bytes for batch in model.plan.batches)
            assert abs(model.stats.streamed_bytes - num_passes * model.plan.read_bytes) <= ahead


@pytest.mark.parametrize("name", NAMES)
def test_the_first_pass_fills_what_stays_and_reads_nothing_twice(tiny: WriteTiny, name: str) -> None:
    with stream(tiny(name, FP32), max_memory=PLENTY) as model:
        assert model.plan.streamed_bytes == 0
        assert model.plan.rows_from_disk == {}
        logits(model, IDS)
        greedy(model, IDS)
        read = model.stats.streamed_bytes
        assert read <= 1.02 * model.plan.checkpoint_bytes + 64 * 4096  # a page at the ends of every run
        greedy(model, IDS)
        assert model.stats.streamed_bytes == read
        assert model.stats.missed <= len(model.plan.batches)
        assert not any(isinstance(parameter, RowTable) for parameter in model.parameters())


def test_a_larger_budget_never_streams_more(tiny: WriteTiny) -> None:
    folder = tiny("llama", FP32)
    least = least_memory(folder, **STREAMING)["cpu"]
    streamed = []
    for more in range(0, 900_000, 50_000):
        with stream(folder, max_memory={"cpu": least + more}) as model:
            streamed.append(model.plan.streamed_bytes)
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[0] > 400_000
    assert streamed[-1] == 0
    assert len(set(streamed)) > 8, "single tensors become resident, not just whole layers"


def test_resident_memory_comes_back_on_close(tiny: WriteTiny) -> None:
    with simulated_accelerator() as sim:
        model = stream(tiny("llama", FP32), "sim:0", max_memory=PLENTY_OF_BOTH)
        logits(model, IDS)
        assert sim.allocated_bytes > model.plan.resident_bytes > 0
        model.close()
        assert weights_of(model) == []
        del model
        assert sim.allocated_bytes == 0


def test_a_failure_in_a_layer_leaves_only_what_stays(tiny: WriteTiny, resident: Resident) -> None:
    folder = tiny("llama", FP32)
    memory = {"cpu": least_memory(folder, **STREAMING)["cpu"] + 150_000}
    with stream(folder, max_memory=memory) as model:
        logits(model, IDS)
        between = weights_of(model)
        stays = {name for batch in model.plan.batches for name in batch.resident}
        assert 0 < len(stays) < 36
        assert stays <= set(between)

        def fail(module: nn.Module, *_: Any) -> None:
            raise ZeroDivisionError

        handle = model.get_submodule("model.layers.2.mlp").register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            logits(model, IDS)
        handle.remove()
        assert weights_of(model) == between
        assert torch.equal(logits(model, IDS), logits(resident("llama", FP32, FP32), IDS))


# ------------------------------------------------------------------------------------------------- the host tier


@pytest.mark.parametrize("is_pinnable", [True, False])
def test_what_host_memory_holds_is_not_read_again(tiny: WriteTiny, resident: Resident, is_pinnable: bool) -> None:
    folder = tiny("llama", FP32)
    reference = on_accelerator(resident("llama", FP32, FP32))
    with simulated_accelerator(is_pinnable=is_pinnable) as sim:
        memory = least_memory(folder, "sim:0", **STREAMING) | {"cpu": 1 << 30}
        with stream(folder, "sim:0", max_memory=memory) as model:
            assert model.plan.hosted_bytes > 0
            assert model.plan.read_bytes == 0 < model.plan.streamed_bytes
            assert torch.equal(logits(model, IDS), logits(reference, IDS))
            read, sent = model.stats.streamed_bytes, sim.h2d_bytes
            for count in range(1, 4):
                assert torch.equal(logits(model, IDS), logits(reference, IDS))
                assert model.stats.streamed_bytes == read
                assert sim.h2d_bytes - sent >= count * 0.9 * model.plan.streamed_bytes
            assert model.stats.host_bytes > 0
        assert sim.races == []


def test_pinned_memory_is_given_back(tiny: WriteTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the model is closed, whatever has been pinned by then, and nothing is pinned afterwards."""
    pinned: list[int] = []
    monkeypatch.setattr(SimRuntime, "pin", lambda _, buffer: pinned.append(buffer.tensor.data_ptr()) is None)
    monkeypatch.setattr(SimRuntime, "unpin", lambda _, buffer: pinned.remove(buffer.tensor.data_ptr()))
    with simulated_accelerator():
        memory = least_memory(tiny("llama", FP32), "sim:0", **STREAMING) | {"cpu": 1 << 30}
        model = stream(tiny("llama", FP32), "sim:0", max_memory=memory)
        logits(model, IDS)
        model._engine.machinery.backend.wait_pinned()
        assert len(pinned) > 8 + 8  # more than the staging buffers
        model.close()
        assert pinned == []


# ------------------------------------------------------------------------- when a generation outgrows its plan


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
@pytest.mark.parametrize("is_final", [True, False])
def test_growth_gives_residents_up_and_takes_them_back(
    tiny: WriteTiny, resident: Resident, device: str, is_final: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Never out of memory while something can be given up; the same tokens; one line in the log each time."""
    folder, reference = tiny("llama", FP32), resident("llama", FP32, FP32)
    options = STREAMING | {"max_batch_size": 1, "max_context": 32 if is_final else None}
    with ExitStack() as stack:
        if device == "sim:0":
            sim = stack.enter_context(simulated_accelerator())
            reference = on_accelerator(reference)
        least = least_memory(folder, device, **options)
        memory = with_more(least, {"cpu" if device == "cpu" else 0: 360_000 if is_final else 260_000})
        model = stack.enter_context(stream(folder, device, **options, max_memory=memory))
        greedy(model, IDS)
        before = model.plan.resident_bytes
        cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
        with caplog.at_level(logging.WARNING, logger="airstream"):
            for step in range(14 if is_final else 20):  # passes that nothing announced
                ids = torch.randint(3, VOCAB_SIZE, (1, 16), generator=torch.Generator().manual_seed(step))
                output = model(ids.to(model.device), logits_to_keep=1, **cache_in(model, cache))
                expected = reference(ids, logits_to_keep=1, **cache_in(model, other))
                assert torch.equal(output.logits.cpu(), expected.logits)
        assert model.plan.resident_bytes < before
        demotions = [record for record in caplog.records if "are streamed from now on" in record.message]
        assert 1 <= len(demotions) <= 12
        del cache, output
        assert torch.equal(greedy(model, IDS), greedy(reference, IDS))
        assert model.plan.resident_bytes == before, "the residents come back"
        if device == "sim:0":
            assert sim.peak_bytes <= max(memory[0] - DEVICE_RUNTIME_BYTES, CHUNK_BYTES)  # in which the bus was measured
            assert sim.races == []


def test_what_cannot_be_made_room_for_is_refused_and_nothing_is_lost(tiny: WriteTiny, resident: Resident) -> None:
    folder = tiny("llama", FP32)
    memory = with_more(least_memory(folder, **STREAMING), {"cpu": 300_000})
    with stream(folder, max_memory=memory) as model:
        expected = logits(model, IDS)
        with pytest.raises(BudgetError, match=r"8 x 4,000 tokens .* need .* max_memory leaves"):
            model(torch.zeros((8, 4000), dtype=torch.long))
        assert torch.equal(logits(model, IDS), expected)


def test_a_plan_follows_the_call_unless_a_context_was_asked_for(tiny: WriteTiny) -> None:
    """What a short call does not need for its KV cache holds weights."""
    folder = tiny("llama", FP32)
    least = least_memory(folder, **(STREAMING | {"max_context": 256}))
    with stream(folder, max_memory=least) as model:
        greedy(model, IDS)
        assert model.plan.max_context == 256
        assert model.plan.resident_bytes == least_resident(model)
    with stream(folder, max_memory=least, max_context=None) as model:
        greedy(model, IDS)
        assert model.plan.max_context == IDS.shape[1] + 6
        assert model.plan.resident_bytes > least_resident(model)


def least_resident(model: Any) -> int:
    """Of a plan in which no layer stays: the lm_head's bytes if that does."""
    return sum(batch.resident_bytes for batch in model.plan.batches if batch.units == ("lm_head",))


def test_a_device_that_has_no_byte_more_will_do(tiny: WriteTiny) -> None:
    """It has exactly what the plan says, less what real devices take for themselves."""
    folder = tiny("llama", FP32)
    with simulated_accelerator():
        memory = with_more(least_memory(folder, "sim:0", **STREAMING), {0: 123_456})
    limit = memory[0] - DEVICE_RUNTIME_BYTES
    with simulated_accelerator(memory_limit=limit), stream(folder, "sim:0", max_memory=memory) as model:
        greedy(model, IDS)
        logits(model, IDS)


def test_a_change_of_plan_that_fails_is_made_up_for(
    tiny: WriteTiny, resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call fails, nothing stays bound, and the next call works."""
    folder, options = tiny("llama", FP32), STREAMING | {"max_context": 32, "max_batch_size": 1}
    long = torch.randint(3, VOCAB_SIZE, (1, 64), generator=torch.Generator().manual_seed(2))
    expected = resident("llama", FP32, FP32)(long, logits_to_keep=1).logits
    memory = with_more(least_memory(folder, **options), {"cpu": 300_000})
    with stream(folder, **options, max_memory=memory) as model:
        logits(model, IDS)
        with monkeypatch.context() as patch:
            patch.setattr("airstream.model.executor.Streamer", lambda *_: fail_from_within(MemoryError()))
            with pytest.raises(BudgetError, match="could not be allocated"):
                model(long, logits_to_keep=1)
        stays = {name for batch in model.plan.batches for name in (*batch.resident, *batch.units)}
        assert not stays & set(weights_of(model))
        assert torch.equal(model(long, logits_to_keep=1).logits, expected)
        assert torch.equal(logits(model, IDS), logits(resident("llama", FP32, FP32), IDS))
