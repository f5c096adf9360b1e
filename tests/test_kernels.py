"""What oneDNN keeps of compiled kernels is in the plan: prompts of many lengths do not take more than is planned."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from airstream import AutoModel
from airstream.kernels import CACHE_LIMITS, KernelLimit, kernel_bytes
from airstream.units import MIB
from tests.conftest import WriteTiny

GROWTH = """
import sys, torch
from airstream.hardware import process_bytes
if sys.argv[1]:
    from airstream import AutoModel
    model = AutoModel.from_pretrained(sys.argv[1], device="cpu", max_memory="1GiB", max_context=256)
    call = lambda tokens: model(torch.ones((1, tokens), dtype=torch.long), use_cache=False)
else:
    weight = torch.ones((64, 64), dtype=torch.bfloat16)
    call = lambda tokens: torch.nn.functional.linear(torch.ones((tokens, 64), dtype=torch.bfloat16), weight)
with torch.no_grad():
    call(250)
    before = process_bytes()
    for tokens in range(1, 200):
        call(tokens)
print(process_bytes() - before)
"""


def growth(folder: str) -> int:
    """Bytes that a fresh process takes for prompts of 199 lengths: of a streamed model, or of one linear layer."""
    environment = {name: value for name, value in os.environ.items() if name not in CACHE_LIMITS}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, folder], check=True, capture_output=True, text=True, env=environment
    )
    return int(done.stdout.split()[-1])


def test_prompts_of_many_lengths_take_no_more_kernels_than_are_planned(tiny: WriteTiny) -> None:
    if growth("") < 64 * MIB:
        pytest.skip("this processor keeps no kernels")
    folder = tiny("llama", torch.bfloat16)
    planned = AutoModel.plan(folder, device="cpu", max_memory="1GiB", max_context=256).tiers["cpu"].items["kernels"]
    assert growth(str(folder)) <= planned


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_LIMITS[0], "5")
    monkeypatch.delenv(CACHE_LIMITS[1], raising=False)
    KernelLimit(torch.bfloat16).set()
    assert os.environ[CACHE_LIMITS[0]] == "5"
    assert CACHE_LIMITS[1] not in os.environ


def test_only_half_precision_has_kernels_to_keep(tiny: WriteTiny) -> None:
    assert kernel_bytes(torch.float32) == 0
    folder = tiny("llama", torch.float32)
    assert "kernels" not in AutoModel.plan(folder, device="cpu").tiers["cpu"].items
