"""The same promises on a real CUDA device: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import WriteTiny, stream
from tests.tiny_models import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDS = torch.arange(3, 15)[None]
OPTIONS: dict[str, Any] = {"device": "cuda", "max_memory": {0: "2GiB", "cpu": "2GiB"}}


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
def test_many_passes_through_a_small_ring(prefetch: int, layers: int, tiny: WriteTiny) -> None:
    folder = tiny("llama", torch.bfloat16)
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cuda")
    expected = resident.generate(IDS.cuda(), max_new_tokens=64, do_sample=False)
    with stream(folder, prefetch_batches=prefetch, layers_per_batch=layers, **OPTIONS) as model:
        assert torch.equal(model.generate(IDS.cuda(), max_new_tokens=64, do_sample=False), expected)


def test_device_memory_stays_within_the_plan_and_comes_back(tiny: WriteTiny) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with stream(tiny("llama", torch.bfloat16), **OPTIONS) as model:
        model.generate(IDS.cuda(), max_new_tokens=16, do_sample=False)
        assert torch.cuda.max_memory_allocated() - before <= model.plan.tiers["0"].peak_bytes
    del model
    assert torch.cuda.memory_allocated() - before < 1 << 20
