"""The same promises on a real CUDA device: `pytest -m gpu`."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import STREAMING, WriteTiny, least_memory, stream
from tests.stand_ins.tiny_models import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDS = torch.arange(3, 15)[None]
OPTIONS: dict[str, Any] = {"device": "cuda", "max_batch_size": 1}
GIB = 1 << 30
MEMORY: dict[str, dict[Any, int]] = {
    "all is streamed": {},
    "part is resident": {0: 200_000},
    "all is in host memory": {"cpu": GIB},
    "all is resident": {0: GIB, "cpu": GIB},
}
"""What there is beyond the least."""


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_and_tokens_equal_the_resident_model(name: str, dtype: torch.dtype, tiny: WriteTiny) -> None:
    folder = tiny(name, torch.bfloat16)
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cuda")
    with stream(folder, dtype=dtype, **OPTIONS) as model, torch.no_grad():
        assert torch.equal(model(IDS.cuda()).logits, resident(IDS.cuda()).logits)
        tokens = model.generate(IDS.cuda(), max_new_tokens=8, do_sample=False)
        assert torch.equal(tokens, resident.generate(IDS.cuda(), max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("prefetch", [0, 1, 2, 3])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("more", MEMORY.values(), ids=MEMORY)
def test_many_passes_whatever_stays(prefetch: int, layers: int, more: dict[Any, int], tiny: WriteTiny) -> None:
    folder = tiny("llama", torch.bfloat16)
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cuda")
    expected = resident.generate(IDS.cuda(), max_new_tokens=64, do_sample=False)
    options = STREAMING | OPTIONS | {"prefetch_batches": prefetch, "layers_per_batch": layers}
    memory = {tier: size + more.get(tier, 0) for tier, size in least_memory(folder, **options).items()}
    with stream(folder, **options, max_memory=memory) as model:
        assert torch.equal(model.generate(IDS.cuda(), max_new_tokens=64, do_sample=False), expected)


KERNEL_CYCLES = 20_000_000
"""About 10 ms of a GPU that does nothing but count."""


def test_a_profile_equals_the_truth_of_the_device(tiny: WriteTiny) -> None:
    """Kernels of a known length in every layer, timed by events of the test's own."""
    with stream(tiny("llama", torch.bfloat16), **OPTIONS) as model:
        model(IDS.cuda())
        timers: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

        def begin(*_: object) -> None:
            timers.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            timers[-1][0].record()

        def work(*_: object) -> None:
            torch.cuda._sleep(KERNEL_CYCLES)
            timers[-1][1].record()

        for layer in model.model.layers:
            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(work)
        torch.cuda.synchronize()
        started = time.perf_counter()
        with model.profile() as profile:
            for _ in range(5):
                model(IDS.cuda())
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    truth = sum(start.elapsed_time(end) for start, end in timers) / 1e3
    costs = profile.total
    assert costs.compute_seconds == pytest.approx(truth, abs=0.05 * wall)  # the lm_head and the norms are in no timer
    assert costs.compute_seconds + costs.stall_seconds + costs.python_seconds == pytest.approx(costs.wall_seconds)
    assert costs.wall_seconds == pytest.approx(wall, rel=0.1)
    assert 0 < costs.links["H2D"].seconds < wall


def test_device_memory_stays_within_the_plan_and_comes_back(tiny: WriteTiny) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with stream(tiny("llama", torch.bfloat16), **OPTIONS) as model:
        model.generate(IDS.cuda(), max_new_tokens=16, do_sample=False)
        assert torch.cuda.max_memory_allocated() - before <= model.plan.tiers["0"].peak_bytes
    del model
    assert torch.cuda.memory_allocated() - before < 1 << 20
