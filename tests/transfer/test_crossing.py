"""What waits in host memory packed crosses packed, in chunks of whole blocks, and is decoded on the device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from airstream.codecs.block_types import BLOCK_TYPES
from airstream.reporting.probe import Probe
from airstream.transfer.accelerator import AcceleratorBackend
from airstream.transfer.crossing import Crossing
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.jobs import Outcome
from airstream.transfer.landing import cast_into
from airstream.transfer.piece import Cast, Piece
from airstream.transfer.reader import Reader
from tests.conftest import simulated_accelerator
from tests.stand_ins.sim import RaceError, SimDevice, SimEvent, SimRuntime, StillClock
from tests.stand_ins.tiny_gguf import random_blocks

Q4, Q6, Q8 = (BLOCK_TYPES[name] for name in ("Q4_0", "Q6_K", "Q8_0"))
IN_BF16 = Cast(Q4, "bfloat16", Q4.nbytes, 2 * Q4.elements)
IN_FP32 = Cast(Q6, "float32", Q6.nbytes, 4 * Q6.elements)
DEALT = Cast(Q8, "float32", 4 * 2 * Q8.nbytes, 4 * 2 * 4 * Q8.elements, rows=4, ways=2)
CASTS = (IN_BF16, IN_FP32, DEALT)
WORKERS = 3


@given(
    cast=st.sampled_from([None, *CASTS]),
    count=st.integers(0, 40),
    chunk_bytes=st.integers(1, 5000),
    source=st.integers(0, 99),
    target=st.integers(0, 99),
)
def test_chunks_are_whole_items_side_by_side(
    cast: Cast | None, count: int, chunk_bytes: int, source: int, target: int
) -> None:
    item, made = (1, 1) if cast is None else (cast.source_item_bytes, cast.target_item_bytes)
    whole = Crossing(source, count * item, target, cast)
    chunks = list(whole.chunks(chunk_bytes))
    assert sum(chunk.nbytes for chunk in chunks) == whole.nbytes
    assert all(0 < chunk.nbytes <= max(chunk_bytes, item) and chunk.nbytes % item == 0 for chunk in chunks)
    assert all(one.nbytes + item > chunk_bytes for one, _ in pairwise(chunks)), "a chunk takes what it can"
    starts = list(accumulate((chunk.nbytes for chunk in chunks), initial=0))[: len(chunks)]
    assert [chunk.source - source for chunk in chunks] == starts
    assert [chunk.target - target for chunk in chunks] == [start // item * made for start in starts]


@pytest.mark.parametrize("is_pinnable", [True, False], ids=["pinned", "refused"])
@pytest.mark.parametrize("cast", CASTS, ids=["blocks", "super-blocks", "dealt"])
def test_blocks_cross_packed_and_become_numbers_on_the_device(tmp_path: Path, cast: Cast, is_pinnable: bool) -> None:
    """With less scratch than there is to decode, by several threads, beside bytes that are not packed, twice."""
    blocks = random_blocks(cast.source.name, (700, cast.source_item_bytes))
    nbytes, plain = blocks.nbytes, 3 * PAGE_BYTES + 5
    (file := tmp_path / "weights.bin").write_bytes(blocks.tobytes() + bytes(range(256)) * (plain // 256 + 1))
    expected = torch.empty(cast.bytes_made_of(nbytes) + plain, dtype=torch.uint8)
    cast_into(expected[:-plain], torch.from_numpy(blocks).flatten(), cast)
    expected[-plain:] = torch.from_file(str(file), size=nbytes + plain, dtype=torch.uint8)[nbytes:]
    crossings = [Crossing(0, nbytes, 0, cast), Crossing(nbytes, plain, len(expected) - plain)]
    assert nbytes > PAGE_BYTES, "one chunk takes it all"
    with simulated_accelerator(is_pinnable=is_pinnable) as sim:
        backend = AcceleratorBackend(SimRuntime(sim, is_pinnable), WORKERS, PAGE_BYTES, Probe(), packed=True)
        hosted, memory = backend.allocate_host(nbytes + plain), backend.allocate(len(expected))
        fence = backend.new_fence()
        with Reader([file], direct=False, num_workers=WORKERS, chunk_bytes=PAGE_BYTES) as reader:
            reader.read([Piece(file, 0, nbytes + plain, 0)], hosted.landing())
            backend.wait_pinned()
            for _ in range(2):
                memory.fill_(0)
                backend.mark_computed()
                sent = sim.h2d_bytes
                backend.begin_fill()
                reader.run(hosted.send(memory, crossings), outcome := Outcome())
                outcome.wait()
                backend.end_fill(fence)
                backend.wait_filled(fence)
                assert torch.equal(memory.cpu(), expected)
                assert sim.h2d_bytes - sent == nbytes + plain
        hosted.close()
        backend.close()
        del memory
        assert sim.races == []


def test_what_is_pinned_and_plain_needs_no_reader_thread() -> None:
    crossings = [Crossing(0, 64, 0), Crossing(64, 2 * Q4.nbytes, 64, IN_BF16)]
    with simulated_accelerator() as sim:
        backend = AcceleratorBackend(SimRuntime(sim), 1, PAGE_BYTES, packed=True)
        hosted, memory = backend.allocate_host(PAGE_BYTES), backend.allocate(PAGE_BYTES)
        backend.begin_fill()
        assert len(hosted.send(memory, crossings)) == 2, "it is not pinned yet"
        hosted.landing()
        backend.wait_pinned()
        assert [len(hosted.send(memory, crossings[:count])) for count in (1, 2)] == [0, 1]
        backend.synchronize()
        hosted.close()
        backend.close()


class Unheard(SimEvent):
    """An event that nobody who waits for it hears of."""

    point = property(lambda _: None, lambda *_: None)  # type: ignore[assignment]  # for SimEvent a field


def without(backend: AcceleratorBackend, left_out: str, sim: SimDevice) -> None:
    """Leave one order out of those that `backend` keeps."""
    bus = backend._bus
    if left_out == "given up":
        bus._decoded = Unheard(sim)
    elif left_out:
        bus._scratches = [replace(scratch, **{left_out: Unheard(sim)}) for scratch in bus._scratches]


@pytest.mark.parametrize(
    ("left_out", "bug"),
    [
        ("", ""),
        ("is_full", "the decoder does not wait for the bytes"),
        ("is_free", "bytes are overwritten before they have been decoded"),
        ("given up", "what nobody waits for any more is decoded into memory that was given to others"),
    ],
    ids=["as it is", "is_full", "is_free", "given up"],
)
def test_an_order_left_out_is_caught(left_out: str, bug: str) -> None:
    """Of a fill that was given up, by another one in its place, which is not packed."""
    blocks = Crossing(0, 900 * Q4.nbytes, 0, IN_BF16)
    with pytest.raises(RaceError) if bug else nullcontext(), simulated_accelerator(raise_races=False) as sim:
        backend = AcceleratorBackend(SimRuntime(sim), 1, PAGE_BYTES, packed=True)
        without(backend, left_out, sim)
        hosted, memory = backend.allocate_host(blocks.nbytes), backend.allocate(blocks.target_bytes)
        hosted.landing()
        backend.wait_pinned()
        backend.begin_fill()
        for errand in hosted.send(memory, [blocks]):
            errand(0)
        backend.begin_fill()
        hosted.send(memory, [Crossing(0, blocks.nbytes, blocks.target_bytes - blocks.nbytes)])
        backend.synchronize()
        hosted.close()
        backend.close()
    assert bool(sim.races) == bool(bug), bug


def test_the_bus_goes_on_while_blocks_are_decoded() -> None:
    """Chunks that take a second to cross and a second to decode take a second each, and one more. In simulated time."""
    count, chunk_bytes = 12, PAGE_BYTES // Q4.nbytes * Q4.nbytes
    blocks = Crossing(0, count * chunk_bytes, 0, IN_BF16)
    clock = StillClock()
    with simulated_accelerator(host=clock, kernel_seconds=1.0, copy_bytes_per_second=chunk_bytes) as sim:
        backend = AcceleratorBackend(SimRuntime(sim), 1, PAGE_BYTES, packed=True)
        hosted, memory = backend.allocate_host(blocks.nbytes), backend.allocate(blocks.target_bytes)
        hosted.landing()
        backend.wait_pinned()
        backend.synchronize()
        start = clock.now()
        backend.begin_fill()
        for errand in hosted.send(memory, [blocks]):
            errand(0)
        backend.synchronize()
        assert clock.now() - start == pytest.approx(count + 1)
        hosted.close()
        backend.close()
