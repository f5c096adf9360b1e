"""The simulated accelerator computes what the CPU computes, and catches the bugs that a real one would hide."""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from tests.stand_ins import sim as sim_module
from tests.stand_ins.sim import Access, History, RaceError, SimDevice, SimEvent, SimRuntime, SimStream, SimTensor

if TYPE_CHECKING:
    from airstream.transfer.runtime import Runtime

NBYTES = 64  # of a slot


@pytest.fixture
def sim() -> Iterator[SimDevice]:
    with SimDevice() as device:
        yield device


@pytest.fixture
def tolerant_sim() -> Iterator[SimDevice]:
    """One that goes on after a race, of which there has to be one."""
    with pytest.raises(RaceError), SimDevice(raise_races=False) as device:
        yield device


def weights(value: float) -> torch.Tensor:
    """`NBYTES` bytes on the host: float32 numbers, all of them `value`."""
    return torch.full((NBYTES // 4,), float(value)).view(torch.uint8)


ONES, TWOS = weights(1), weights(2)  # a copy does not keep its source alive


def number(slot: torch.Tensor) -> torch.Tensor:
    """What a layer computes from the weights in `slot`: `value` again, on the device."""
    return slot.view(torch.float32).mean()


# ------------------------------------------------------------------------------------- as good a device as the CPU

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
CONFIGS = [
    LlamaConfig(**TINY),
    GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4),
    Qwen3MoeConfig(**TINY, **MIXTURE),
]


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_models_compute_what_they_compute_on_the_cpu(sim: SimDevice, config: PretrainedConfig) -> None:
    model, ids = tiny_model(config), torch.arange(3, 17).view(2, 7)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    logits, tokens = model(ids).logits, model.generate(ids, **options)
    model.to("sim")
    options["attention_mask"] = options["attention_mask"].to("sim")
    assert torch.equal(model(ids.to("sim")).logits.cpu(), logits)
    assert torch.equal(model.generate(ids.to("sim"), **options).cpu(), tokens)


def test_inference_mode(sim: SimDevice) -> None:
    model, ids = tiny_model(CONFIGS[0]), torch.arange(3, 10).view(1, 7)
    with torch.inference_mode():
        logits = model(ids).logits
        assert torch.equal(model.to("sim")(ids.to("sim")).logits.cpu(), logits)


FACTORIES = {
    "arange": lambda device: torch.arange(5, device=device),
    "arange from": lambda device: torch.arange(2, 5, device=device),
    "arange by": lambda device: torch.arange(0, 1, 0.25, device=device),
    "zeros": lambda device: torch.zeros(2, 3, device=device),
    "full": lambda device: torch.full((2,), 7, dtype=torch.int8, device=device),
    "tensor": lambda device: torch.tensor([[1.5, 2.5]], device=device),
    "scalar": lambda device: torch.tensor(2, device=device),
    "ones_like": lambda device: torch.ones_like(torch.empty(3), device=device),
    "new_tensor": lambda device: torch.empty(2, device=device).new_tensor([1, 2]),
    "to": lambda device: torch.eye(3).to(device, torch.bfloat16),
    "transposed": lambda device: torch.eye(3).t().to(device),
    "nothing": lambda device: torch.zeros(0, 3, device=device),
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_factories(sim: SimDevice, make: Any) -> None:
    ours, theirs = make("sim"), make("cpu")
    assert isinstance(ours, SimTensor)
    assert ours.device == sim.device
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    assert torch.equal(ours.cpu(), theirs)
    assert ours.tolist() == theirs.tolist()


def test_views_alias_their_memory(sim: SimDevice) -> None:
    slab = torch.zeros(NBYTES, dtype=torch.uint8, device="sim")
    matrix = slab[16:48].view(torch.float32).view(2, 4)
    matrix.t()[1:3].copy_(torch.ones(2, 2))
    assert slab.cpu()[16:48].view(torch.float32).tolist() == [0, 1, 1, 0, 0, 1, 1, 0]
    assert matrix.data_ptr() == slab.data_ptr() + 16
    assert sim.allocated_bytes == NBYTES


def test_parameters_alias_what_they_are_made_of(sim: SimDevice) -> None:
    slab = torch.zeros(4, device="sim")
    parameter = torch.nn.Parameter(slab[1:3], requires_grad=False)
    slab.fill_(5)
    assert parameter.tolist() == parameter.data.tolist() == [5, 5]
    with pytest.raises(NotImplementedError, match=r"assigning to \.data"):
        parameter.data = slab[:2]


def test_a_deep_copy_has_memory_of_its_own(sim: SimDevice) -> None:
    ours = torch.ones(2, device="sim")
    theirs = copy.deepcopy(ours)
    ours.zero_()
    assert theirs.tolist() == [1, 1]


def test_autocast_can_be_turned_off(sim: SimDevice) -> None:
    with torch.autocast("sim", enabled=False):
        assert torch.ones(2, 2, device="sim").matmul(torch.ones(2, device="sim")).dtype == torch.float32


def test_what_a_wrapper_cannot_follow_is_refused(sim: SimDevice) -> None:
    with pytest.raises(NotImplementedError, match="shape of a tensor in place"):
        torch.empty(3, 2, device="sim").t_()
    with pytest.raises(NotImplementedError, match="shape of a tensor in place"):
        torch.eye(3, device="sim")  # resizes what it fills


def test_mixed_devices_are_refused(sim: SimDevice) -> None:
    ours, theirs = torch.ones(3, device="sim"), torch.ones(3)
    mixes: list[Callable[[], torch.Tensor]] = [
        lambda: ours + theirs,
        lambda: torch.cat([theirs, ours]),
        lambda: theirs.add_(ours),
        lambda: ours @ theirs,
    ]
    for mix in mixes:
        with pytest.raises(RuntimeError, match=r"same device, but aten\..* got cpu and sim:0"):
            mix()
    assert (ours + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert ours[torch.tensor([0, 2])].tolist() == [1, 1]


def test_a_second_import_shares_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("sim_again", sim_module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sim_again", again)
    spec.loader.exec_module(again)
    for module in (again, sim_module, again):
        with module.SimDevice():
            assert isinstance(torch.arange(3, device="sim") + 1, module.SimTensor)


def test_one_device_at_a_time(sim: SimDevice) -> None:
    with pytest.raises(RuntimeError, match="one sim:0 at a time"), SimDevice():
        pass


def test_no_memory_outside_of_the_context() -> None:
    with SimDevice():
        ours = torch.ones(2, device="sim")
    assert (ours + ours).tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="outside of"):
        torch.ones(2, device="sim")


# ---------------------------------------------------------------------------------------------------------- memory


def test_memory_is_counted_once_and_given_back(sim: SimDevice) -> None:
    slab = torch.zeros(100, device="sim")
    view = slab[10:].view(9, 10)
    assert sim.allocated_bytes == 400
    double = slab + slab
    assert sim.allocated_bytes == 800
    del slab, double
    assert (sim.allocated_bytes, sim.peak_bytes) == (400, 800)
    del view
    assert (sim.allocated_bytes, sim.peak_bytes) == (0, 800)


def test_memory_limit() -> None:
    with SimDevice(memory_limit=100) as sim:
        kept = torch.zeros(60, dtype=torch.uint8, device="sim")
        allocations: list[Callable[[], torch.Tensor]] = [
            lambda: torch.empty(41, dtype=torch.uint8, device="sim"),
            lambda: kept + 1,
            lambda: kept.clone(),
        ]
        for allocate in allocations:
            with pytest.raises(torch.OutOfMemoryError, match="60 of 100 bytes allocated; "):
                allocate()
        assert sim.peak_bytes == 60
        assert torch.empty(40, dtype=torch.uint8, device="sim").nbytes == 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_uninitialised_memory_is_not_a_number(sim: SimDevice, dtype: torch.dtype) -> None:
    fresh = torch.empty(8, dtype=dtype, device="sim")
    for tensor in (
        fresh,
        torch.empty_like(fresh),
        fresh.new_empty(3),
        torch.empty_strided((2, 2), (1, 2), device="sim"),
    ):
        assert tensor.float().isnan().all()


def test_freed_memory_is_not_a_number(sim: SimDevice) -> None:
    slab = torch.ones(4, device="sim")
    behind_our_back, view = bytes_of(slab), slab[1:]
    del slab
    assert behind_our_back.tolist() == [1, 1, 1, 1]
    del view
    assert behind_our_back.isnan().all()


def test_bytes_from_the_host_are_counted(sim: SimDevice) -> None:
    runtime = SimRuntime(sim)
    slot = runtime.empty(NBYTES)
    assert sim.h2d_bytes == 0
    slot.copy_(weights(1))
    torch.ones(5).to("sim")
    assert sim.h2d_bytes == NBYTES + 20
    runtime.synchronize()
    runtime.copy(slot, ONES, runtime.new_stream())
    assert sim.h2d_bytes == NBYTES + 20
    runtime.synchronize()
    assert sim.h2d_bytes == 2 * NBYTES + 20


# ----------------------------------------------------------------------------------------------------- late copies


def prepared(sim: SimDevice, num_slots: int = 1) -> tuple[SimRuntime, SimStream, list[torch.Tensor]]:
    """A runtime, a copy stream, and slots that any stream may write."""
    runtime = SimRuntime(sim)
    slots = [runtime.empty(NBYTES) for _ in range(num_slots)]
    runtime.synchronize()
    return runtime, runtime.new_stream(), slots


def bytes_of(slot: torch.Tensor) -> torch.Tensor:
    """What lies in `slot` now, looked at behind the simulation's back."""
    assert isinstance(slot, SimTensor)
    return slot.raw


def test_a_copy_runs_when_it_is_waited_for(sim: SimDevice) -> None:
    runtime, copies, (by_host, by_compute, never) = prepared(sim, 3)
    for slot, wait in (by_host, SimEvent.synchronize), (by_compute, runtime.compute_stream().wait_event):
        event = runtime.new_event()
        runtime.copy(slot, TWOS, copies)
        copies.record_event(event)
        assert (bytes_of(slot) == 0xFF).all()
        wait(event)
        assert torch.equal(bytes_of(slot), TWOS)
        assert number(slot).item() == 2
    runtime.copy(never, TWOS, copies)
    event.synchronize()
    assert (bytes_of(never) == 0xFF).all()
    runtime.synchronize()
    assert torch.equal(bytes_of(never), TWOS)


def test_a_copy_reads_its_source_when_it_runs(sim: SimDevice) -> None:
    runtime, copies, (slot,) = prepared(sim)
    staging = weights(1)
    runtime.copy(slot, staging, copies)
    staging.copy_(weights(2))
    runtime.synchronize()
    assert number(slot).item() == 2


def test_a_source_freed_before_its_copy_has_run_is_caught(tolerant_sim: SimDevice) -> None:
    runtime, copies, (slot,) = prepared(tolerant_sim)
    staging = weights(1)
    runtime.copy(slot, staging[:], copies)
    runtime.copy(slot, weights(1), copies)
    runtime.synchronize()
    assert tolerant_sim.races == ["race: a copy runs after its source on the host was freed"]
    assert number(slot).isnan().item()


def test_a_stream_runs_what_it_waits_for_first(sim: SimDevice) -> None:
    runtime, first, (slot, other) = prepared(sim, 2)
    second, filled, done = runtime.new_stream(), runtime.new_event(), runtime.new_event()
    runtime.copy(slot, ONES, first)
    first.record_event(filled)
    runtime.copy(other, ONES, first)
    second.wait_event(filled)
    runtime.copy(slot, TWOS, second)
    second.record_event(done).synchronize()
    assert number(slot).item() == 2
    assert (bytes_of(other) == 0xFF).all()
    runtime.synchronize()


def test_an_event_never_recorded_holds_nobody_up(sim: SimDevice) -> None:
    runtime, copies, _ = prepared(sim)
    event = runtime.new_event()
    event.synchronize()
    copies.wait_event(event)
    runtime.synchronize()


def test_copies_that_are_not_bytes_to_the_device_are_refused(sim: SimDevice) -> None:
    runtime, copies, (slot,) = prepared(sim)
    with pytest.raises(ValueError, match="from cpu to sim:0, not from cpu to cpu"):
        runtime.copy(ONES, ONES, copies)
    for source in (ONES[1:], ONES.float(), torch.zeros(2 * NBYTES, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match=r"is not \d+ contiguous bytes"):
            runtime.copy(slot, source, copies)


def test_it_is_a_runtime(sim: SimDevice) -> None:
    runtime: Runtime = SimRuntime(sim, pinnable=False)
    buffer = torch.zeros(8, dtype=torch.uint8)
    assert runtime.device == sim.device
    assert not runtime.pin(buffer)
    assert SimRuntime(sim).pin(buffer)
    runtime.unpin(buffer)


# ----------------------------------------------------------------------------------------------------------- races


def test_only_what_an_event_was_recorded_behind_is_ordered(tolerant_sim: SimDevice) -> None:
    runtime, copies, (slot, late) = prepared(tolerant_sim, 2)
    event = runtime.new_event()
    runtime.copy(slot, ONES, copies)
    copies.record_event(event)
    runtime.copy(late, ONES, copies)
    runtime.compute_stream().wait_event(event)
    number(slot)
    assert tolerant_sim.races == []
    number(late)
    assert len(tolerant_sim.races) == 1
    assert (
        "bytes [0, 64) of an allocation of 64, and nothing orders it behind a copy on the copy" in tolerant_sim.races[0]
    )


def test_ranges_of_one_allocation_do_not_race(tolerant_sim: SimDevice) -> None:
    runtime, copies, (slab,) = prepared(tolerant_sim)
    number(slab[:32])
    runtime.copy(slab[32:], ONES[:32], copies)
    assert tolerant_sim.races == []
    runtime.copy(slab[28:32], ONES[:4], copies)
    assert (
        "[28, 32) of an allocation of 64, and nothing orders it behind aten.mean.default on the compute"
        in tolerant_sim.races[0]
    )


def test_having_run_is_not_having_finished(sim: SimDevice) -> None:
    runtime, copies, (slot,) = prepared(sim)
    number(slot)
    with pytest.raises(RaceError, match=r"a copy on the copy .* aten\.mean\.default on the compute stream"):
        runtime.copy(slot, ONES, copies)
    sim.check()  # was raised already
    runtime.synchronize()


@pytest.mark.parametrize("take", ["item", "cpu", "tolist", "__bool__", "synchronize"])
def test_the_host_knows_what_it_has_waited_for(sim: SimDevice, take: str) -> None:
    runtime, copies, (slot,) = prepared(sim)
    result = number(slot)
    getattr(runtime if take == "synchronize" else result, take)()
    runtime.copy(slot, ONES, copies)
    runtime.synchronize()


def test_the_host_does_not_wait_for_a_non_blocking_transfer(tolerant_sim: SimDevice) -> None:
    runtime, copies, (slot,) = prepared(tolerant_sim)
    number(slot).to("cpu", non_blocking=True)
    torch.empty(1).copy_(number(slot), non_blocking=True)
    torch.tensor([], device="sim")  # has nothing to wait for
    runtime.copy(slot, ONES, copies)
    runtime.synchronize()
    assert len(tolerant_sim.races) == 1


def test_reads_race_with_writes_only(tolerant_sim: SimDevice) -> None:
    _, copies, slots = prepared(tolerant_sim)
    assert isinstance(slots[0], SimTensor)
    tolerant_sim.touch(slots[0], copies, "a read", is_write=False)
    number(slots[0])
    assert tolerant_sim.races == []
    slots[0].zero_()
    assert "race: aten.zero_.default on the compute stream" in tolerant_sim.races[0]
    tolerant_sim.touch(slots[0], copies, "a read", is_write=False)
    slots.clear()
    assert "race: the freeing on the compute stream" in tolerant_sim.races[-1]


def test_memory_belongs_to_the_compute_stream(tolerant_sim: SimDevice) -> None:
    runtime = SimRuntime(tolerant_sim)
    slot, copies = runtime.empty(NBYTES), runtime.new_stream()
    runtime.copy(slot, ONES, copies)
    assert "nothing orders it behind the allocation by aten.empty" in tolerant_sim.races[0]
    del slot
    assert "the freeing on the compute stream" in tolerant_sim.races[1]


def test_a_race_in_a_thread_waits_for_the_check(sim: SimDevice) -> None:
    runtime, copies, (slot,) = prepared(sim)
    number(slot)
    thread = threading.Thread(target=runtime.copy, args=(slot, ONES, copies))
    thread.start()
    thread.join()
    with pytest.raises(RaceError, match="a copy"):
        sim.check()
    runtime.synchronize()


def race(sim: SimDevice) -> None:
    runtime, copies, (slot,) = prepared(sim)
    runtime.copy(slot, ONES, copies)
    number(slot)
    runtime.synchronize()  # too late


def test_leaving_the_context_checks() -> None:
    with pytest.raises(RaceError), SimDevice(raise_races=False) as sim:
        race(sim)


def test_leaving_the_context_does_not_hide_an_exception() -> None:
    def fail() -> None:
        with SimDevice(raise_races=False) as sim:
            race(sim)
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_history_agrees_with_one_that_keeps_every_byte(sim: SimDevice) -> None:
    dice, num_bytes = random.Random(0), 12
    streams = [sim.compute_stream, *(sim.new_stream(name) for name in "ab")]
    first = streams[0].access("the first")
    history = History(num_bytes, first)
    writes, reads = [first] * num_bytes, [dict[int, Access]() for _ in range(num_bytes)]
    for step in range(2, 2000):
        start, stop = sorted(dice.sample(range(num_bytes + 1), 2))
        stream, is_write = dice.choice(streams), dice.random() < 0.3
        clock = {each.index: dice.randrange(step) for each in streams} | {stream.index: step}
        access = Access(stream, clock, step)
        seen = writes[start:stop]
        for at in range(start, stop):
            if is_write:
                seen += reads[at].values()
                writes[at], reads[at] = access, {}
            else:
                reads[at][stream.index] = access
        found = (history.write if is_write else history.read)(start, stop, access)
        assert (found is None) == all(each.is_before(access) for each in seen)
        assert found is None or found in seen
        assert len(history._spans) <= num_bytes


# --------------------------------------------------------------------------------- planted bugs: a streamer in small


def streamed(sim: SimDevice, forget: str = "nothing", num_staging: int = 3, num_layers: int = 7) -> list[float]:
    """Compute a number from every layer, prefetching the next two, with one of the waits left out."""
    runtime, copies, slots = prepared(sim, 3)
    compute = runtime.compute_stream()
    staging = [weights(-1) for _ in range(num_staging)]
    filled, released = [[runtime.new_event() for _ in slots] for _ in range(2)]
    staged = [runtime.new_event() for _ in staging]

    def fill(layer: int) -> None:
        slot, buffer = layer % len(slots), layer % len(staging)
        if forget != "staging buffer":
            staged[buffer].synchronize()
        staging[buffer].copy_(weights(layer))
        if forget != "release":
            copies.wait_event(released[slot])
        runtime.copy(slots[slot], staging[buffer], copies)
        copies.record_event(staged[buffer])
        copies.record_event(filled[slot])

    def compute_with(layer: int) -> torch.Tensor:
        slot = layer % len(slots)
        if forget != "fill":
            compute.wait_event(filled[slot])
        result = number(slots[slot])
        compute.record_event(released[slot])
        return result

    results = []
    for layer in range(-2, num_layers):
        if layer + 2 < num_layers:
            fill(layer + 2)
        if layer >= 0:
            results.append(compute_with(layer))
    runtime.synchronize()
    return [result.item() for result in results]


RIGHT = [float(layer) for layer in range(7)]


@pytest.mark.parametrize("num_staging", [1, 2, 3])
def test_correct_code_raises_nothing(sim: SimDevice, num_staging: int) -> None:
    assert streamed(sim, num_staging=num_staging) == RIGHT
    assert sim.races == []


def test_correct_code_raises_nothing_with_a_reader_thread(sim: SimDevice) -> None:
    """The reader fills each slot through its own staging buffer, while this thread computes with the other."""
    runtime, copies, slots = prepared(sim, 2)
    filled, released, staging = [runtime.new_event() for _ in slots], [runtime.new_event() for _ in slots], weights(-1)
    full, empty = threading.Semaphore(0), threading.Semaphore(len(slots))

    def read() -> None:
        for layer in range(len(RIGHT)):
            empty.acquire()
            staging.copy_(weights(layer))
            copies.wait_event(released[layer % 2])
            runtime.copy(slots[layer % 2], staging, copies)
            copies.record_event(filled[layer % 2])
            full.release()
            filled[layer % 2].synchronize()

    reader = threading.Thread(target=read)
    reader.start()
    results = []
    for layer in range(len(RIGHT)):
        full.acquire()
        runtime.compute_stream().wait_event(filled[layer % 2])
        results.append(number(slots[layer % 2]))
        runtime.compute_stream().record_event(released[layer % 2])
        empty.release()
    reader.join()
    assert [result.item() for result in results] == RIGHT
    assert sim.races == []


def test_a_forgotten_wait_for_the_fill_is_caught(tolerant_sim: SimDevice) -> None:
    assert streamed(tolerant_sim, forget="fill") != RIGHT
    assert "aten.mean.default on the compute stream" in tolerant_sim.races[0]


def test_a_slot_reused_before_its_release_is_caught(tolerant_sim: SimDevice) -> None:
    assert streamed(tolerant_sim, forget="release") == RIGHT  # computations run at once: only the race tells
    assert "race: a copy on the copy stream" in tolerant_sim.races[0]


def test_a_staging_buffer_reused_too_early_is_caught(sim: SimDevice) -> None:
    assert streamed(sim, forget="staging buffer", num_staging=2) != RIGHT


def test_a_slot_freed_before_its_copy_has_run_is_caught(tolerant_sim: SimDevice) -> None:
    runtime, copies, slots = prepared(tolerant_sim)
    runtime.copy(slots[0], ONES, copies)
    slots.clear()
    assert "the freeing on the compute stream" in tolerant_sim.races[0]
