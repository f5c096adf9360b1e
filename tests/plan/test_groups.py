"""Which tensors become resident together: neighbours, from the ends of a batch inwards, in small steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from airstream.layout.tensors import TensorSpec
from airstream.plan.groups import KnownSizes, batch_facts
from airstream.transfer.packing import Packing, packing_of
from airstream.transfer.piece import Cast, Piece

CPU = packing_of(torch.device("cpu"))
FILE = Path("model.safetensors")
CAST = Cast("uint8", "uint8", 1, 1)
NAMES = ("norm1", "down", "gate", "up", "norm2", "k", "o", "q", "v")
LLAMA = (1, 4096, 4096, 4096, 1, 512, 1536, 1536, 512)
"""KiB of a layer's tensors, as they lie in a file."""


def layers(count: int, sizes: tuple[int, ...] = LLAMA, file: Path = FILE, start: int = 0) -> list[TensorSpec]:
    specs, offset = [], start
    for layer in range(count):
        for name, kib in zip(NAMES, sizes, strict=True):
            piece = Piece(file, offset, kib << 10, 0)
            specs.append(TensorSpec(f"layers.{layer}.{name}", torch.uint8, (kib << 10,), (piece,)))
            offset += kib << 10
    return specs


def test_the_groups_of_a_layer() -> None:
    facts = batch_facts(("layers.0",), layers(1), CPU, {})
    names = [tuple(name.rpartition(".")[2] for name in group.names) for group in facts.groups]
    assert names == [("q", "v"), ("k", "o"), ("up", "norm2"), ("gate",), ("norm1", "down")]


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_steps_are_small_however_many_layers_move_together(count: int) -> None:
    facts = batch_facts([f"layers.{layer}" for layer in range(count)], layers(count), CPU, {})
    whole = sum(group.nbytes for group in facts.groups)
    assert max(group.nbytes for group in facts.groups) <= whole * (0.3 if count == 1 else 0.15)
    assert len(facts.groups) >= 5
    assert facts.slab_bytes[0] >= whole * 0.99
    assert list(facts.slab_bytes) == sorted(facts.slab_bytes, reverse=True)
    assert facts.slab_bytes[-1] == facts.read_bytes[-1] == 0


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_left_to_stream_is_one_run_of_the_file(count: int) -> None:
    specs = layers(count)
    facts = batch_facts([f"layers.{layer}" for layer in range(count)], specs, CPU, {})
    places = {spec.name: (spec.pieces[0].offset, spec.pieces[0].offset + spec.nbytes) for spec in specs}
    for resident in range(len(facts.groups)):
        left = sorted(places[name] for name in facts.names(resident, len(facts.groups)))
        assert left[-1][1] - left[0][0] == sum(end - start for start, end in left)


OTHER = Path("other.safetensors")
TWO = ((FILE, OTHER), (OTHER, FILE))
VARIED = {
    "alike": [layers(1, start=start) for start in (0, 4096, 4096 * 777)],
    "entered elsewhere in a page": [layers(1, start=start) for start in (0, 8, 64, 100, 4096 + 64)],
    "of other sizes": [layers(1), layers(1, sizes=LLAMA[::-1])],
    "of another type": [layers(1), [replace(spec, dtype=torch.int16, shape=(spec.nbytes // 2,)) for spec in layers(1)]],
    "elsewhere in a line": [[replace(spec, line_offset=offset) for spec in layers(1)] for offset in (None, 0, 16)],
    "in another order": [layers(1), layers(1)[::-1]],
    "in two files": [layers(1), *([*layers(1, file=a)[:4], *layers(1, file=b)[4:]] for a, b in TWO)],
    "cast": [layers(1), [replace(spec, pieces=(replace(spec.pieces[0], cast=CAST),)) for spec in layers(1)]],
    "nothing": [[], layers(1)],
}


@pytest.mark.parametrize("packing", [CPU, Packing(follows_file=False, alignment=256)], ids=["CPU", "device"])
@pytest.mark.parametrize("batches", VARIED.values(), ids=VARIED)
def test_what_is_known_of_other_batches_changes_nothing(batches: list[list[TensorSpec]], packing: Packing) -> None:
    known: KnownSizes = {}
    for number, specs in enumerate([*batches, *batches]):
        named = [replace(spec, name=f"{number}.{spec.name}") for spec in specs]
        units = [f"layers.{number}"]
        assert batch_facts(units, named, packing, known) == batch_facts(units, named, packing, {})


def test_batches_that_lie_alike_are_laid_out_once() -> None:
    known: KnownSizes = {}
    for layer in range(50):
        batch_facts((f"layers.{layer}",), layers(1, start=layer * 4096 * 99), CPU, known)
    assert len(known) == 1
