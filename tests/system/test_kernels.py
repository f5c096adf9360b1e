"""What oneDNN keeps of compiled kernels stays within the plan: prompts of many lengths take no more than is planned."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from airstream.system.kernels import CACHE_LIMITS, KernelLimit
from tests.conftest import WriteTiny

LENGTHS = """
import sys, torch, transformers
from airstream.auto import AutoModel
from airstream.system.memory import PeakMemory
memory = PeakMemory()
model = AutoModel.from_pretrained(sys.argv[1], device="cpu", max_memory="1GiB", max_context=256)
for tokens in range(1, 200):
    model(torch.ones((1, tokens), dtype=torch.long), use_cache=False)
print(memory.rise(), model.plan.peak_bytes["cpu"])
"""


def test_prompts_of_many_lengths_take_no_more_than_is_planned(tiny: WriteTiny) -> None:
    """Without the limit, a processor that keeps kernels takes half a gigabyte; others have nothing to limit."""
    environment = {name: value for name, value in os.environ.items() if name not in CACHE_LIMITS}
    done = subprocess.run(
        [sys.executable, "-c", LENGTHS, str(tiny("llama", torch.bfloat16))],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    measured, planned = map(int, done.stdout.split()[-2:])
    assert measured <= planned


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_LIMITS[0], "5")
    monkeypatch.delenv(CACHE_LIMITS[1], raising=False)
    KernelLimit(torch.bfloat16).set()
    assert os.environ[CACHE_LIMITS[0]] == "5"
    assert CACHE_LIMITS[1] not in os.environ
