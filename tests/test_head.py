"""The last positions of several sequences go through the lm_head with transformers' bits, and without copies of it."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from airstream.model.head import take_sequences_apart

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTH, VOCAB_SIZE = 256, 4096


@pytest.fixture(params=[BF16, FP16, FP32], ids=str)
def head(request: pytest.FixtureRequest) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCAB_SIZE, bias=False, dtype=request.param).requires_grad_(False)


@pytest.mark.parametrize("sequences", [1, 2, 5])
@pytest.mark.parametrize("kept", [1, 3, 12])
def test_the_bits_are_those_of_the_slice(head: nn.Linear, sequences: int, kept: int) -> None:
    hidden = torch.randn(sequences, 12, WIDTH, dtype=head.weight.dtype)[:, -kept:, :]
    expected = head(hidden)
    undo = take_sequences_apart(head)
    assert torch.equal(head(hidden), expected)
    twin = copy.deepcopy(head)
    twin.weight.zero_()
    assert not twin(hidden).any(), "a copy computes with its own weight"
    undo()
    assert type(head) is nn.Linear
    assert torch.equal(head(hidden), expected)


MEASURE = """
import sys, torch
from airstream.model.head import take_sequences_apart

def peak():  # of this program: what getrusage says begins with the peak of the one that started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

head = torch.nn.Linear(1024, 32768, bias=False, dtype=getattr(torch, sys.argv[1])).requires_grad_(False)
take_sequences_apart(head) if sys.argv[2] == "apart" else None
hidden = torch.ones(5, 12, 1024, dtype=head.weight.dtype)
head(hidden[0])
before = peak()
head(hidden[:, -1:, :])
print((peak() - before) * 1024 / head.weight.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
@pytest.mark.parametrize(("dtype", "copies"), [("bfloat16", 0), ("float16", 1)])
def test_no_weight_is_copied_for_every_sequence(dtype: str, copies: int) -> None:
    def copied(way: str) -> float:
        command = [sys.executable, "-c", MEASURE, dtype, way]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert copied("apart") < copies + 0.5
    assert copied("together") > 3, "torch has changed: look whether this is still needed"
