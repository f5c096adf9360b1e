"""What a batch waits for: bytes that come every time, bytes that come once, errands; and who hears of a failure."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from airstream.errors import ReadError
from airstream.layout.slab import Slab
from airstream.reporting.probe import Probe
from airstream.reporting.stats import StreamStats
from airstream.streaming.fill import Fill, Filling, Resident
from airstream.streaming.measure import measure_link
from airstream.streaming.streamer import Streamer
from airstream.transfer.cpu import CpuBackend
from airstream.transfer.files import PAGE_BYTES, WeightFile
from airstream.transfer.jobs import ReadCancelled
from airstream.transfer.machinery import Machinery
from airstream.transfer.piece import Piece
from airstream.transfer.reader import Reader

CONTENT = random.Random(5).randbytes(12 * PAGE_BYTES)
NOTHING = Slab(0, (), {}, ())
PATIENCE = 10.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def reader(file: Path) -> Iterator[Reader]:
    with Reader([file], direct=False, num_workers=3, chunk_bytes=PAGE_BYTES) as reader:
        yield reader


def slab(file: Path, first_page: int, num_pages: int) -> Slab:
    nbytes = num_pages * PAGE_BYTES
    return Slab(nbytes, (Piece(file, first_page * PAGE_BYTES, nbytes, 0),), {}, ())


def resident(file: Path, first_page: int, num_pages: int) -> Resident:
    return Resident(slab(file, first_page, num_pages), torch.zeros(num_pages * PAGE_BYTES, dtype=torch.uint8))


def content(first_page: int, num_pages: int) -> bytes:
    return CONTENT[first_page * PAGE_BYTES : (first_page + num_pages) * PAGE_BYTES]


class Waiter:
    """An `on_done` that can be waited for, and counts."""

    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []
        self._done = threading.Event()

    def __call__(self, error: BaseException | None) -> None:
        self.errors.append(error)
        self._done.set()

    def wait(self) -> BaseException | None:
        assert self._done.wait(PATIENCE), "it never ended"
        (error,) = self.errors
        return error


def fill(what: Fill, memory: torch.Tensor, reader: Reader) -> BaseException | None:
    waiter = Waiter()
    Filling(what, memory, reader, CpuBackend(PAGE_BYTES), waiter, urgent=False)
    return waiter.wait()


def test_what_stays_is_read_once_and_what_is_streamed_every_time(file: Path, reader: Reader) -> None:
    stays = resident(file, 4, 3)
    what = Fill(slab(file, 0, 4), 4 * PAGE_BYTES, (stays,))
    assert what.to_read_bytes == 7 * PAGE_BYTES
    for expected in (7, 11, 15):
        memory = torch.zeros(4 * PAGE_BYTES, dtype=torch.uint8)
        assert fill(what, memory, reader) is None
        assert memory.numpy().tobytes() == content(0, 4)
        assert stays.memory.numpy().tobytes() == content(4, 3)
        assert reader.bytes_read == expected * PAGE_BYTES
        assert what.to_read_bytes == 4 * PAGE_BYTES
    assert not what.is_complete


def test_a_batch_that_stays_is_complete_after_its_first_fill(file: Path, reader: Reader) -> None:
    what = Fill(NOTHING, 0, (resident(file, 0, 2), resident(file, 5, 2)))
    assert not what.is_complete
    assert fill(what, torch.empty(0, dtype=torch.uint8), reader) is None
    assert what.is_complete
    assert fill(what, torch.empty(0, dtype=torch.uint8), reader) is None
    assert reader.bytes_read == 4 * PAGE_BYTES


def test_a_failure_is_told_once_and_only_what_is_missing_is_read_again(
    file: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = resident(file, 0, 2), resident(file, 5, 2)
    what = Fill(slab(file, 8, 2), 2 * PAGE_BYTES, (whole, broken))
    read_into = WeightFile.read_into

    def failing(self: WeightFile, view: memoryview, offset: int, needed: int) -> None:
        if offset >= 5 * PAGE_BYTES and offset < 7 * PAGE_BYTES:
            raise ReadError("the disk failed")
        read_into(self, view, offset, needed)

    memory = torch.zeros(2 * PAGE_BYTES, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(WeightFile, "read_into", failing)
        assert isinstance(fill(what, memory, reader), ReadError)
    assert (whole.loaded, broken.loaded) == (True, False)
    before = reader.bytes_read
    assert fill(what, memory, reader) is None
    assert reader.bytes_read - before == 4 * PAGE_BYTES
    assert broken.memory.numpy().tobytes() == content(5, 2)


def test_errands_run_on_reader_threads_and_their_errors_are_seen(reader: Reader) -> None:
    threads, waiter = [], Waiter()
    reader.run([lambda worker: threads.append((worker, threading.current_thread().name))] * 5, waiter)
    assert waiter.wait() is None
    assert len(threads) == 5
    assert all(name == f"airstream-reader-{worker}" for worker, name in threads)

    def fail(_: int) -> None:
        raise ZeroDivisionError

    waiter = Waiter()
    reader.run([fail, fail], waiter)
    assert isinstance(waiter.wait(), ZeroDivisionError)


def test_a_cancelled_fill_ends_and_says_so(file: Path, reader: Reader) -> None:
    gate, holding = threading.Event(), Waiter()
    reader.run([lambda _: gate.wait(PATIENCE)] * 3, holding)  # all threads are busy
    waiter, stays = Waiter(), resident(file, 4, 3)
    what = Fill(slab(file, 0, 4), 4 * PAGE_BYTES, (stays,))
    memory = torch.zeros(4 * PAGE_BYTES, dtype=torch.uint8)
    filling = Filling(what, memory, reader, CpuBackend(PAGE_BYTES), waiter, urgent=False)
    filling.cancel()
    gate.set()
    assert isinstance(waiter.wait(), ReadCancelled)
    assert not stays.loaded
    assert holding.wait() is None


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
def test_batches_that_stay_are_no_longer_asked_of_the_disk(file: Path, reader: Reader, prefetch: int) -> None:
    """Nor do they take the place of those that have to be read ahead."""
    fills = [
        Fill(slab(file, 0, 2), 2 * PAGE_BYTES),
        Fill(NOTHING, 0, (resident(file, 2, 2),)),
        Fill(slab(file, 4, 2), 2 * PAGE_BYTES, (resident(file, 6, 1),)),
        Fill(NOTHING, 0, (resident(file, 7, 2), resident(file, 9, 1))),
        Fill(NOTHING, 0, (resident(file, 10, 1),)),
    ]
    machinery = Machinery(reader, CpuBackend(PAGE_BYTES), Probe(), StreamStats())
    streamer = Streamer(fills, 4 * PAGE_BYTES, prefetch, machinery)
    streamer.start()
    for passes in range(4):
        for batch, what in enumerate(fills):
            if passes and what.is_complete:
                continue  # as the hooks do
            with streamer.lease(batch) as region:
                assert region.memory.numpy().tobytes() == (content(4 * (batch // 2), 2) if what.slab.nbytes else b"")
                for stays in what.resident:
                    first_page, num_pages = stays.slab.pieces[0].offset // PAGE_BYTES, len(stays.memory) // PAGE_BYTES
                    assert stays.loaded
                    assert stays.memory.numpy().tobytes() == content(first_page, num_pages)
    assert [what.is_complete for what in fills] == [False, True, False, True, True]
    link = measure_link(streamer)
    streamer.close()
    assert streamer.stats.streamed_bytes == (7 + 4) * PAGE_BYTES, "both have a place of their own: read once each"
    assert (link.nbytes, link.link, link.bytes_per_second) == (0, None, None), "nothing passes any more"
