"""What waits in host memory lies there as in its file if it is packed, and what crosses makes the tensors whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airstream.codecs.block_types import BLOCK_TYPES
from airstream.layout.as_stored import pack_as_stored
from airstream.layout.slab import MAX_GAP_BYTES, Slab, pack
from airstream.layout.tensors import TensorSpec
from airstream.transfer.cpu import CpuBackend
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.landing import cast_into
from airstream.transfer.packing import HOST_PACKING
from airstream.transfer.piece import Cast, Piece
from airstream.transfer.reader import Reader
from tests.stand_ins.tiny_gguf import random_blocks

CASTS: Sequence[Cast | None] = (
    None,
    Cast("float16", "float32", 2, 4),
    *(
        Cast(BLOCK_TYPES[name], "float32", BLOCK_TYPES[name].nbytes, 4 * BLOCK_TYPES[name].elements)
        for name in ("Q4_0", "Q8_0")
    ),
    Cast(BLOCK_TYPES["Q8_0"], "float32", 2 * 34, 2 * 128, rows=2, ways=2),
)
MAX_ITEMS, FILE_BYTES = 300, 3 << 20
"""Of a piece; and of a file of random blocks of Q8_0, which hold no scale that is infinite or no number."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "weights.bin"
    path.write_bytes(random_blocks("Q8_0", (FILE_BYTES // 34, 34)).tobytes())
    return path


@st.composite
def tensors(draw: st.DrawFn, file: Path) -> list[TensorSpec]:
    """Tensors of one or several pieces, packed or not, that lie in `file` in any order, with gaps, without overlap."""
    casts = draw(st.lists(st.lists(st.sampled_from(CASTS), min_size=1, max_size=4), min_size=1, max_size=4))
    slots = random.Random(draw(st.integers(0, 999))).sample(range(60), sum(map(len, casts)))
    specs = []
    for number, each in enumerate(casts):
        pieces: list[Piece] = []
        for cast in each:
            item = 4 if cast is None else cast.source_item_bytes
            offset = slots.pop() * 45_000 + draw(st.integers(0, 40)) * 4
            target = sum(piece.target_bytes for piece in pieces)
            pieces.append(Piece(file, offset, draw(st.integers(1, MAX_ITEMS)) * item, target, cast))
        nbytes = sum(piece.target_bytes for piece in pieces)
        specs.append(TensorSpec(f"tensor {number}", torch.float32, (nbytes // 4,), tuple(pieces)))
    return specs


def read(slab: Slab, file: Path, direct: bool = False) -> torch.Tensor:
    backend = CpuBackend(PAGE_BYTES * 16)
    memory = backend.allocate(slab.nbytes)
    with Reader([file], direct, num_workers=2, chunk_bytes=PAGE_BYTES * 16) as reader:
        reader.read(slab.pieces, backend.landing(memory))
    return memory


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), chunk_bytes=st.integers(1, 9000))
def test_what_crosses_makes_the_tensors_that_reads_make(file: Path, data: st.DataObject, chunk_bytes: int) -> None:
    specs = data.draw(tensors(file))
    slab, crossings = pack_as_stored(specs)
    waiting, expected = read(slab, file), pack(specs, HOST_PACKING)
    numbers = read(expected, file)
    for spec in specs:
        made = torch.full((spec.nbytes,), 0xAA, dtype=torch.uint8)
        for chunk in (chunk for crossing in crossings[spec.name] for chunk in crossing.chunks(chunk_bytes)):
            raw = waiting[chunk.source : chunk.source + chunk.nbytes]
            cast_into(made[chunk.target : chunk.target + chunk.target_bytes], raw, chunk.cast)
        start = expected.offsets[spec.name]
        assert torch.equal(made, numbers[start : start + spec.nbytes])
        assert sum(crossing.nbytes for crossing in crossings[spec.name]) == sum(
            piece.nbytes if piece.cast is not None and piece.cast.is_blocks else piece.target_bytes
            for piece in spec.pieces
        )


def test_packed_pieces_lie_as_in_the_file_and_are_read_in_place(file: Path) -> None:
    """Experts that one tensor is merged of by turns, out of two that lie side by side, are one read."""
    cast, size, start = CASTS[2], 18 * 32, 3 * PAGE_BYTES + 100
    assert cast is not None
    made = cast.bytes_made_of(size)
    gates = [Piece(file, start + expert * size, size, 2 * expert * made, cast) for expert in range(8)]
    ups = [replace(gate, offset=gate.offset + 8 * size, target=gate.target + made) for gate in gates]
    pieces = tuple(piece for pair in zip(gates, ups, strict=True) for piece in pair)
    spec = TensorSpec("experts", torch.float32, (16 * made // 4,), pieces)
    slab, _ = pack_as_stored([spec])
    assert slab.pieces == (Piece(file, start, 16 * size, start % PAGE_BYTES),)
    assert slab.nbytes == -(-(start % PAGE_BYTES + 16 * size) // PAGE_BYTES) * PAGE_BYTES


@pytest.mark.parametrize(
    "cast",
    [*CASTS[:2], Cast(BLOCK_TYPES["TQ2_0"], "float32", 66, 1024)],
    ids=["plain", "of another dtype", "no device decodes it"],
)
def test_what_is_not_packed_or_not_for_a_device_waits_as_it_computes(file: Path, cast: Cast | None) -> None:
    """Numbers may be wider in the file than where they compute."""
    item = 4 if cast is None else cast.source_item_bytes
    first = Piece(file, MAX_GAP_BYTES, 100 * item, 0, cast)
    pieces = (first, Piece(file, 800, 100 * item, first.target_bytes, cast))
    nbytes = sum(piece.target_bytes for piece in pieces)
    spec = TensorSpec("weight", torch.float32, (nbytes // 4,), pieces)
    slab, crossings = pack_as_stored([spec])
    assert slab == pack([spec], HOST_PACKING)
    assert [(crossing.nbytes, crossing.cast) for crossing in crossings["weight"]] == [(nbytes, None)]
