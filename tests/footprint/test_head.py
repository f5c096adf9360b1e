"""The last positions of several sequences go through the lm_head with transformers' bits, and without copies of it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

import airstream.footprint.lm_head as head_module
import airstream.loading.gather as facts_module
from airstream.footprint.lm_head import Way, copies_weights, sequence_by_sequence, take_sequences_apart, way_of
from airstream.loading.options import LoadOptions
from airstream.loading.prepare import prepare
from tests.conftest import WriteTiny

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTH, VOCAB_SIZE = 256, 4096


@pytest.fixture(params=[BF16, FP16, FP32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def head(request: pytest.FixtureRequest, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCAB_SIZE, bias=request.param, dtype=dtype).requires_grad_(False)


SLICES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the last position": lambda hidden: hidden[:, -1:, :],
    "the last three": lambda hidden: hidden[:, -3:, :],
    "all": lambda hidden: hidden,
    "every other one": lambda hidden: hidden[:, ::2, :],
    "picked ones": lambda hidden: hidden[:, [3, 1], :],
    "half of the width of twice as much": lambda hidden: torch.cat([hidden, hidden], dim=-1)[:, -2:, :WIDTH],
    "without a dimension of positions": lambda hidden: hidden[:, -1, :],
    "of several codebooks": lambda hidden: hidden[:, None, -2:, :],
}
"""What models give their lm_head of the hidden states."""


@pytest.mark.parametrize("sequences", [1, 2, 5])
@pytest.mark.parametrize("kept", SLICES)
def test_the_bits_are_those_of_the_slice(head: nn.Linear, sequences: int, kept: str) -> None:
    hidden = SLICES[kept](torch.randn(sequences, 12, WIDTH, dtype=head.weight.dtype))
    expected = head(hidden)
    undo = take_sequences_apart(head)
    assert torch.equal(head(hidden), expected)
    twin = copy.deepcopy(head)
    for tensor in twin.parameters():
        tensor.zero_()
    assert not twin(hidden).any(), "a copy computes with its own weight"
    undo()
    assert type(head) is nn.Linear
    assert torch.equal(head(hidden), expected)


@pytest.mark.parametrize("way", [Way.IN_ROWS, Way.IN_SLICES])
def test_taken_apart_the_bits_are_the_same_with_a_bias_too(
    head: nn.Linear, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every processor, in the ways that keep the bits of the product there, though none may be needed."""
    hidden = torch.randn(3, 12, WIDTH, dtype=head.weight.dtype)[:, -2:]
    if not torch.equal(sequence_by_sequence(hidden, head.weight, way), nn.functional.linear(hidden, head.weight)):
        pytest.skip("this way is not taken here")
    expected = head(hidden)
    monkeypatch.setattr(head_module, "way_of", lambda _: way)
    take_sequences_apart(head)
    assert type(head) is not nn.Linear
    assert torch.equal(head(hidden), expected)


def test_nothing_is_changed_where_torch_copies_nothing(head: nn.Linear) -> None:
    way = way_of(head.weight.dtype)
    assert copies_weights(head.weight.dtype) or way is Way.TOGETHER
    take_sequences_apart(head)
    assert (type(head) is nn.Linear) is (way is Way.TOGETHER)


SEQUENCES = 5

MEASURE = """
import sys, torch
from airstream.footprint.lm_head import take_sequences_apart

def peak():  # of this program: what getrusage says begins with the peak of the one that started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

head = torch.nn.Linear(1024, 32768, bias=False, dtype=getattr(torch, sys.argv[1])).requires_grad_(False)
take_sequences_apart(head) if sys.argv[2] == "apart" else None
hidden = torch.ones(int(sys.argv[3]), 12, 1024, dtype=head.weight.dtype)
head(hidden[0])  # what libraries load
before = peak()
head(hidden[:, -1:, :])
print((peak() - before) * 1024 / head.weight.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
def test_what_was_looked_at_is_what_the_kernel_counts(dtype: torch.dtype) -> None:
    """On a processor of any kind: with AVX-512 torch copies bfloat16 weights, with AVX2 alone it copies none."""
    assert copied(dtype, "together") == pytest.approx(SEQUENCES if copies_weights(dtype) else 0, abs=0.5)
    assert copied(dtype, "apart") == pytest.approx(planned_copies(dtype), abs=0.5)


def copied(dtype: torch.dtype, how: str) -> float:
    """The memory that a head takes for slices of `SEQUENCES`, in weights."""
    command = [sys.executable, "-c", MEASURE, str(dtype).removeprefix("torch."), how, str(SEQUENCES)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def planned_copies(dtype: torch.dtype) -> int:
    return {Way.IN_ROWS: 0, Way.IN_SLICES: 1, Way.TOGETHER: SEQUENCES if copies_weights(dtype) else 0}[way_of(dtype)]


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("copies", [False, True])
def test_the_plan_counts_the_copies(tiny: WriteTiny, way: Way, copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a prompt, for what torch was seen to do: none, one, or one for every sequence."""
    if way is not Way.TOGETHER and not copies:
        pytest.skip("nothing is taken apart where nothing is copied")
    monkeypatch.setattr(facts_module, "way_of", lambda _: way)
    monkeypatch.setattr(facts_module, "copies_weights", lambda _: copies)
    prepared = prepare(tiny("llama", FP16), LoadOptions(device="cpu", max_memory="1GiB"))
    need, head = prepared.facts.footprint, prepared.facts.head
    assert head is not None
    counted = (need.head_copy_bytes // head.slab_bytes[0], need.head_copy_bytes_each // head.slab_bytes[0])
    assert counted == {Way.IN_ROWS: (0, 0), Way.IN_SLICES: (1, 0), Way.TOGETHER: (0, int(copies))}[way]
    grown = replace(need, head_copy_bytes=1 << 30, head_copy_bytes_each=1 << 31)
    assert grown.activation_bytes(3, 100, 100) >= 7 << 30
    assert grown.activation_bytes(3, 1, 100) < 1 << 30, "a decoded token is no slice"
