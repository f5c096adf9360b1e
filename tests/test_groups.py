"""Which tensors become resident together: neighbours, from the ends of a batch inwards, in small steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from airstream.backend import packing_of
from airstream.checkpoint.reader import Piece
from airstream.model.groups import batch_facts
from airstream.tensors import TensorSpec

CPU = packing_of(torch.device("cpu"))
FILE = Path("model.safetensors")
NAMES = ("norm1", "down", "gate", "up", "norm2", "k", "o", "q", "v")
LLAMA = (1, 4096, 4096, 4096, 1, 512, 1536, 1536, 512)
"""KiB of a layer's tensors, as they lie in a file."""


def layers(count: int, sizes: tuple[int, ...] = LLAMA, file: Path = FILE) -> list[TensorSpec]:
    specs, offset = [], 0
    for layer in range(count):
        for name, kib in zip(NAMES, sizes, strict=True):
            piece = Piece(file, offset, kib << 10, 0)
            specs.append(TensorSpec(f"layers.{layer}.{name}", torch.uint8, (kib << 10,), (piece,)))
            offset += kib << 10
    return specs


def test_the_groups_of_a_layer() -> None:
    facts = batch_facts(("layers.0",), layers(1), CPU)
    names = [tuple(name.rpartition(".")[2] for name in group.names) for group in facts.groups]
    assert names == [("q", "v"), ("k", "o"), ("up", "norm2"), ("gate",), ("norm1", "down")]


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_steps_are_small_however_many_layers_move_together(count: int) -> None:
    facts = batch_facts([f"layers.{layer}" for layer in range(count)], layers(count), CPU)
    whole = sum(group.nbytes for group in facts.groups)
    assert max(group.nbytes for group in facts.groups) <= whole * (0.3 if count == 1 else 0.15)
    assert len(facts.groups) >= 5
    assert facts.slab_bytes[0] >= whole * 0.99
    assert list(facts.slab_bytes) == sorted(facts.slab_bytes, reverse=True)
    assert facts.slab_bytes[-1] == facts.read_bytes[-1] == 0


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_left_to_stream_is_one_run_of_the_file(count: int) -> None:
    specs = layers(count)
    facts = batch_facts([f"layers.{layer}" for layer in range(count)], specs, CPU)
    places = {spec.name: (spec.pieces[0].offset, spec.pieces[0].offset + spec.nbytes) for spec in specs}
    for resident in range(len(facts.groups)):
        left = sorted(places[name] for name in facts.names(resident, len(facts.groups)))
        assert left[-1][1] - left[0][0] == sum(end - start for start, end in left)
