"""The streamer hands out the right bytes in any order, reads ahead and no more, and never leaves anybody waiting."""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airstream.errors import BudgetError, ClosedError, ReadError
from airstream.layout.ring import ring_bytes
from airstream.layout.slab import Slab
from airstream.reporting.probe import DISK, Probe
from airstream.reporting.stats import StreamStats
from airstream.streaming.fill import Fill
from airstream.streaming.lease import Lease
from airstream.streaming.region import Region
from airstream.streaming.streamer import Streamer
from airstream.transfer import files
from airstream.transfer.cpu import CpuBackend
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.jobs import Job, ReadCancelled
from airstream.transfer.machinery import Machinery
from airstream.transfer.piece import Landing, Piece
from airstream.transfer.reader import Reader

CHUNK_BYTES = 8192
NUM_PAGES = 64
CONTENT = random.Random(3).randbytes(NUM_PAGES * PAGE_BYTES)
PATIENCE = 10.0
"""Seconds after which a thread that should have ended counts as stuck."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streamed") / "weights.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def slabs_of(file: Path, num_pages: Sequence[int]) -> list[Slab]:
    """Slabs of so many pages, side by side in the file. All but a few bytes of each are read."""
    slabs, start = [], 0
    for pages in num_pages:
        nbytes = pages * PAGE_BYTES
        pieces = (
            Piece(file, start, PAGE_BYTES - 100, 0),
            Piece(file, start + PAGE_BYTES, nbytes - PAGE_BYTES, PAGE_BYTES),
        )
        slabs.append(Slab(nbytes, pieces, {}, ()))
        start += nbytes
    return slabs


def is_right(region: Region, slab: Slab) -> bool:
    raw = region.memory.numpy().tobytes()
    return len(raw) == slab.nbytes and all(
        raw[p.target : p.target + p.nbytes] == CONTENT[p.offset : p.offset + p.nbytes] for p in slab.pieces
    )


@dataclass
class Request:
    """A read that was asked for."""

    pieces: Sequence[Piece]
    landing: Landing
    job: Job
    urgent: bool


class FakeReader:
    """A reader without threads: it notes what it is asked for, and does it when told to, or at once if `eager`."""

    def __init__(self, slabs: Sequence[Slab], eager: bool = False) -> None:
        self.requests: list[Request] = []
        self.asked: list[int] = []  # by batch
        self._batch_of = {slab.pieces[0].offset: batch for batch, slab in enumerate(slabs)}
        self._eager = eager
        self.source = DISK

    def submit(
        self,
        pieces: Sequence[Piece],
        landing: Landing,
        on_done: Callable[[BaseException | None], None],
        urgent: bool = False,
    ) -> Job:
        request = Request(pieces, landing, Job(1, on_done), urgent)
        self.requests.append(request)
        self.asked.append(self._batch_of[pieces[0].offset])
        if self._eager:
            self.finish()
        return request.job

    def finish(self, error: BaseException | None = None) -> None:
        """End the oldest open read: with `error`, or as cancelled, or by reading."""
        request = self.requests.pop(0)
        if request.job.skips and error is None:
            error = ReadCancelled()
        if error is None:
            for piece in request.pieces:
                request.landing.window(0, piece, False)[:] = CONTENT[piece.offset : piece.offset + piece.nbytes]
                request.landing.landed(0, piece, False)
        request.job.finished_one(error)

    def finish_all(self) -> None:
        while self.requests:
            self.finish()


def new_streamer(slabs: Sequence[Slab], reader: Any, prefetch: int, ring_pages: int | None = None) -> Streamer:
    """One whose ring holds `ring_pages`, or else just what `prefetch` needs."""
    nbytes = (
        ring_bytes([slab.nbytes for slab in slabs], prefetch + 1) if ring_pages is None else ring_pages * PAGE_BYTES
    )
    machinery = Machinery(reader, CpuBackend(CHUNK_BYTES), Probe(), StreamStats())
    return Streamer([Fill(slab, slab.nbytes) for slab in slabs], nbytes, prefetch, machinery)


def visit(streamer: Streamer, slabs: Sequence[Slab], batch: int) -> bool:
    """Whether the right bytes are there in between."""
    with streamer.lease(batch) as region:
        return is_right(region, slabs[batch])


class Waiting(threading.Thread):
    """A thread that does one thing, and what came of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._call()
        except BaseException as error:
            self.outcome = error

    def result(self) -> object:
        self.join(PATIENCE)
        assert not self.is_alive(), "it waits forever"
        return self.outcome


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


# ---------------------------------------------------------------------------------------------------- the right bytes


@st.composite
def walks(draw: st.DrawFn) -> tuple[list[int], int, int, list[int]]:
    """Pages of each slab, batches ahead, pages of the ring, and the order in which the batches are asked for."""
    pages = draw(st.lists(st.integers(2, 6), min_size=1, max_size=6))
    prefetch = draw(st.integers(0, 5))
    least = ring_bytes([count * PAGE_BYTES for count in pages], prefetch + 1) // PAGE_BYTES
    ring = draw(st.integers(max(pages), sum(pages)) | st.integers(least, least + 3))
    batches = st.integers(0, len(pages) - 1)
    walk = draw(
        st.lists(batches, max_size=30) | st.lists(batches, min_size=1, max_size=6).map(lambda period: period * 5)
    )
    return pages, prefetch, ring, walk


@settings(max_examples=300, deadline=None)
@given(walk=walks())
def test_any_walk_sees_the_right_bytes_for_as_long_as_it_looks(
    file: Path, walk: tuple[list[int], int, int, list[int]]
) -> None:
    """Every read is done the moment it is asked for, so that one into memory in use shows at once."""
    pages, prefetch, ring, batches = walk
    slabs = slabs_of(file, pages)
    reader = FakeReader(slabs, eager=True)
    streamer = new_streamer(slabs, reader, prefetch, ring)
    streamer.start()
    for batch in batches:
        assert visit(streamer, slabs, batch)
    assert streamer.stats.acquired == len(batches)
    assert streamer.stats.streamed_bytes == sum(slabs[batch].read_bytes for batch in reader.asked)
    streamer.close()


@settings(max_examples=60, deadline=None)
@given(walk=walks(), direct=st.booleans(), num_workers=st.integers(1, 4))
def test_any_walk_sees_the_right_bytes_with_a_real_reader(
    file: Path, walk: tuple[list[int], int, int, list[int]], direct: bool, num_workers: int
) -> None:
    pages, prefetch, ring, batches = walk
    slabs = slabs_of(file, pages)
    with Reader([file], direct, num_workers, CHUNK_BYTES) as reader:
        streamer = new_streamer(slabs, reader, prefetch, ring)
        streamer.start()
        for batch in batches:
            with streamer.lease(batch) as region:
                assert is_right(region, slabs[batch])
                time.sleep(0)  # let a reader thread do harm
                assert is_right(region, slabs[batch])
        streamer.close()


def test_a_batch_asked_for_again_is_not_overwritten_by_what_is_read_ahead(file: Path) -> None:
    """A loop, a b a b c: when b is visited again, it is still there, and c, which comes next, needs room."""
    a, b, c = range(3)
    slabs = slabs_of(file, [2, 3, 6])
    streamer = new_streamer(slabs, FakeReader(slabs, eager=True), prefetch=1)
    for batch in [a, b, a, b, c] * 4:
        assert visit(streamer, slabs, batch)


def test_what_was_just_read_is_fresh(file: Path) -> None:
    """Conversions depend on it."""
    slabs = slabs_of(file, [2, 2])
    reader = FakeReader(slabs, eager=True)
    streamer = new_streamer(slabs, reader, prefetch=0)
    for batch in (0, 1, 0, 1):
        num_asked = len(reader.asked)
        with streamer.lease(batch) as region:
            assert region.fresh
            assert len(reader.asked) == num_asked + 1


# ------------------------------------------------------------------------------------------------------ reading ahead


@pytest.mark.parametrize("prefetch", [0, 1, 3, 10])
def test_nothing_is_read_twice_while_everything_fits(file: Path, prefetch: int) -> None:
    slabs = slabs_of(file, [2, 5, 3, 4])
    with Reader([file], direct=False, chunk_bytes=CHUNK_BYTES) as reader:
        streamer = new_streamer(slabs, reader, prefetch, ring_pages=14)
        for _ in range(4):
            for batch in range(4):
                visit(streamer, slabs, batch)
        total = sum(slab.read_bytes for slab in slabs)
        assert reader.bytes_read == streamer.stats.streamed_bytes == total
        streamer.close()


def test_without_prefetch_nothing_is_read_before_it_is_asked_for(file: Path) -> None:
    slabs = slabs_of(file, [2, 2, 2])
    reader = FakeReader(slabs, eager=True)
    streamer = new_streamer(slabs, reader, prefetch=0, ring_pages=6)
    streamer.start()
    assert reader.asked == []
    for batch in (0, 1, 2):
        with streamer.lease(batch):
            assert reader.asked == list(range(batch + 1))
        assert reader.asked == list(range(batch + 1))
    assert streamer.stats.missed == 3


def test_start_reads_the_first_batches(file: Path) -> None:
    slabs = slabs_of(file, [2] * 5)
    reader = FakeReader(slabs)
    streamer = new_streamer(slabs, reader, prefetch=2)
    streamer.start()
    assert reader.asked == [0, 1]
    reader.finish_all()


def read_late(streamer: Streamer, slabs: Sequence[Slab], reader: FakeReader, passes: int) -> list[int]:
    """Walks over all batches; returns those whose read began only after the batch before had been released."""
    late: list[int] = []
    streamer.start()
    num_asked = len(reader.asked)
    for batch in list(range(len(slabs))) * passes:
        with streamer.lease(batch) as region:
            assert is_right(region, slabs[batch])
            late += [batch] if batch in reader.asked[num_asked:] else []
            num_asked = len(reader.asked)
    return late


@pytest.mark.parametrize(("num_batches", "prefetch"), [(4, 1), (5, 1), (4, 2), (5, 3), (6, 2)])
def test_reading_ahead_wraps_from_the_last_batch_to_the_first(file: Path, num_batches: int, prefetch: int) -> None:
    slabs = slabs_of(file, [3] * num_batches)
    reader = FakeReader(slabs, eager=True)
    streamer = new_streamer(slabs, reader, prefetch)
    assert read_late(streamer, slabs, reader, passes=3) == []
    assert streamer.stats.missed == 0
    assert reader.asked[:2] == [0, 1]
    assert reader.asked.count(0) == 4, "the first batch was not read ahead after the last one"


@pytest.mark.parametrize("pages", [[2, 2, 2, 2, 5], [2, 2, 2, 5], [4, 2, 2, 2, 2], [2, 6, 2, 6]], ids=str)
def test_batches_of_different_sizes_are_read_ahead_too(file: Path, pages: list[int]) -> None:
    """A larger lm_head at the end, say."""
    slabs = slabs_of(file, pages)
    reader = FakeReader(slabs, eager=True)
    assert read_late(new_streamer(slabs, reader, prefetch=1), slabs, reader, passes=4) == []


@settings(max_examples=200, deadline=None)
@given(pages=st.lists(st.integers(2, 9), min_size=1, max_size=8), prefetch=st.integers(1, 4))
def test_the_ring_has_room_for_what_is_read_ahead_of_any_sizes(file: Path, pages: list[int], prefetch: int) -> None:
    """In the order in which the batches are listed, each finds those after it in the ring, or on their way."""
    pages = [count if sum(pages) <= NUM_PAGES else 2 for count in pages]
    slabs = slabs_of(file, pages)
    reader = FakeReader(slabs, eager=True)
    streamer = new_streamer(slabs, reader, prefetch)
    streamer.start()
    for batch in list(range(len(slabs))) * 8:
        with streamer.lease(batch) as region:
            assert is_right(region, slabs[batch])
            ahead = {(batch + distance) % len(slabs) for distance in range(prefetch + 1)}
            assert ahead <= streamer._regions.keys()
    assert streamer.stats.missed == 0


def test_the_batch_that_is_waited_for_is_urgent(file: Path) -> None:
    slabs = slabs_of(file, [2] * 4)
    reader = FakeReader(slabs)
    streamer = new_streamer(slabs, reader, prefetch=1, ring_pages=6)
    streamer.start()
    waiting = Waiting(lambda: streamer.lease(2).region)  # not what had been read ahead
    until(lambda: 2 in reader.asked)
    assert [request.urgent for request in reader.requests][:2] == [False, True]
    reader.finish_all()
    assert is_right(waiting.result(), slabs[2])  # type: ignore[arg-type]
    reader.finish_all()


def test_what_was_read_ahead_makes_room_for_what_is_needed(file: Path) -> None:
    slabs = slabs_of(file, [3, 3, 3, 6])
    streamer = new_streamer(slabs, FakeReader(slabs, eager=True), prefetch=1, ring_pages=6)
    streamer.start()
    visit(streamer, slabs, 0)
    assert visit(streamer, slabs, 3)
    assert visit(streamer, slabs, 0)


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_streamed_bytes_are_exact(file: Path, prefetch: int) -> None:
    slabs = slabs_of(file, [3] * 4)
    with Reader([file], direct=False, chunk_bytes=CHUNK_BYTES) as reader:
        streamer = new_streamer(slabs, reader, prefetch)
        streamer.start()
        for turn in range(12):
            visit(streamer, slabs, turn % 4)
        streamer.close()
        started = 12 + prefetch  # what had been started when it was closed may have been skipped or not
        assert slabs[0].read_bytes * 12 <= streamer.stats.streamed_bytes <= slabs[0].read_bytes * started
        assert streamer.stats.streamed_bytes <= reader.bytes_read
    assert streamer.stats.acquired == 12
    assert streamer.stats.read_seconds > 0


def test_stalls_are_counted(file: Path) -> None:
    slabs = slabs_of(file, [2])
    reader = FakeReader(slabs)
    streamer = new_streamer(slabs, reader, prefetch=0)
    waiting = Waiting(lambda: streamer.lease(0))
    until(lambda: reader.requests)
    time.sleep(0.1)
    reader.finish()
    waiting.result()
    assert 0.09 < streamer.stats.stall_seconds < PATIENCE
    assert 0.09 < streamer.stats.read_seconds < PATIENCE


# ---------------------------------------------------------------------------------------------------------- failures


def test_a_read_ahead_that_failed_is_read_again_when_it_is_needed(file: Path) -> None:
    """One error that does not last is noticed by nobody."""
    slabs = slabs_of(file, [2] * 3)
    reader = FakeReader(slabs)
    streamer = new_streamer(slabs, reader, prefetch=2)
    streamer.start()
    reader.finish()
    reader.finish(ReadError("the disk is on fire"))
    assert visit(streamer, slabs, 0)
    assert reader.asked == [0, 1, 2], "it is not needed yet"
    visiting = Waiting(lambda: visit(streamer, slabs, 1))
    until(lambda: reader.asked.count(1) == 2)
    assert [request.urgent for request in reader.requests] == [False, True]
    reader.finish_all()
    assert visiting.result() is True
    assert visit(streamer, slabs, 2)
    assert reader.asked[:4] == [0, 1, 2, 1]
    assert streamer.stats.streamed_bytes == sum(slab.read_bytes for slab in slabs)


def test_a_read_error_surfaces_where_its_batch_is_needed_and_only_there(file: Path) -> None:
    slabs = slabs_of(file, [2] * 3)
    reader = FakeReader(slabs)
    streamer = new_streamer(slabs, reader, prefetch=2)
    streamer.start()
    reader.finish()
    reader.finish(ReadError("the disk is on fire"))
    assert visit(streamer, slabs, 0)
    reader.finish()
    waiting = Waiting(lambda: streamer.lease(1))
    until(lambda: reader.asked.count(1) == 2)
    failure = ReadError("it still is")
    reader.finish(failure)
    assert waiting.result() is failure
    retry = Waiting(lambda: visit(streamer, slabs, 1))
    until(lambda: reader.asked.count(1) == 3)
    reader.finish_all()
    assert retry.result() is True
    assert visit(streamer, slabs, 2)
    assert streamer.stats.streamed_bytes == sum(slab.read_bytes for slab in slabs)


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_read_that_fails_while_it_is_waited_for_is_not_tried_again_by_itself(file: Path, prefetch: int) -> None:
    slabs = slabs_of(file, [2] * 3)
    reader = FakeReader(slabs)
    streamer = new_streamer(slabs, reader, prefetch)
    streamer.start()
    waiting = Waiting(lambda: streamer.lease(0))
    until(lambda: streamer.stats.acquired == 1 and len(reader.asked) == 1 + prefetch)
    failure = ReadError("the disk is on fire")
    reader.finish(failure)
    assert waiting.result() is failure
    assert reader.asked.count(0) == 1
    retry = Waiting(lambda: visit(streamer, slabs, 0))
    until(lambda: reader.asked.count(0) == 2)
    reader.finish_all()
    assert retry.result() is True
    reader.finish_all()


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("num_failures", [1, 3])
def test_the_read_can_be_tried_until_it_works(
    file: Path, num_failures: int, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that needs the batch raises, but for what failed before anybody needed it."""
    slabs, failures = slabs_of(file, [2] * 3), iter(range(num_failures))
    real = files.WeightFile._read_some

    def read_some(self: files.WeightFile, view: memoryview, offset: int) -> int:
        if offset == slabs[1].pieces[0].offset and next(failures, None) is not None:
            raise OSError(5, os.strerror(5))
        return real(self, view, offset)

    monkeypatch.setattr(files.WeightFile, "_read_some", read_some)
    with Reader([file], direct=False, chunk_bytes=CHUNK_BYTES) as reader:
        streamer = new_streamer(slabs, reader, prefetch)
        streamer.start()
        visit(streamer, slabs, 0)
        until(lambda: not streamer._reading.num_reading)  # what is read ahead has failed
        for _ in range(num_failures - prefetch):
            with pytest.raises(ReadError, match=r"weights\.bin"):
                streamer.lease(1)
        assert visit(streamer, slabs, 1)
        assert visit(streamer, slabs, 2)
        assert next(failures, None) is None
        streamer.close()


# ----------------------------------------------------------------------------------------------------------- closing


def closing_ends(streamer: Streamer, reader: FakeReader) -> None:
    """close() returns, given that the reader ends what was cancelled."""
    closing = Waiting(streamer.close)
    until(lambda: not closing.is_alive() or any(request.job.cancelled for request in reader.requests))
    deadline = time.monotonic() + PATIENCE
    while closing.is_alive() and time.monotonic() < deadline:
        reader.finish_all()
        time.sleep(0.001)
    assert closing.result() is None


def test_close_wakes_a_thread_that_waits_for_its_bytes(file: Path) -> None:
    slabs = slabs_of(file, [2] * 3)
    reader = FakeReader(slabs)
    streamer = new_streamer(slabs, reader, prefetch=1)
    waiting = Waiting(lambda: streamer.lease(0))
    until(lambda: reader.requests)
    closing_ends(streamer, reader)
    assert isinstance(waiting.result(), ClosedError)


def test_close_wakes_a_thread_that_waits_for_room(file: Path) -> None:
    slabs = slabs_of(file, [2] * 2)
    streamer = new_streamer(slabs, FakeReader(slabs, eager=True), prefetch=0)
    lease = streamer.lease(0)
    waiting = Waiting(lambda: streamer.lease(1))
    until(lambda: streamer.stats.acquired == 2)
    time.sleep(0.02)
    streamer.close()
    assert isinstance(waiting.result(), ClosedError)
    lease.end()


@pytest.mark.parametrize("attempt", range(10))
def test_close_wakes_a_thread_that_waits_for_a_read_it_gave_up(file: Path, attempt: int) -> None:
    """The ring is full with what is being read ahead; the thread that needs it for another batch has cancelled that."""
    slabs = slabs_of(file, [2] * 3)
    reader = FakeReader(slabs)
    streamer = new_streamer(slabs, reader, prefetch=1, ring_pages=2)
    streamer.start()
    waiting = Waiting(lambda: streamer.lease(2))
    until(lambda: reader.requests[0].job.cancelled)
    closing = Waiting(streamer.close)
    time.sleep(0.02)
    deadline = time.monotonic() + 2
    while (closing.is_alive() or waiting.is_alive()) and time.monotonic() < deadline:
        reader.finish_all()
        time.sleep(0.001)
    assert not closing.is_alive(), "close() waits forever"
    assert not waiting.is_alive(), "lease() waits forever"
    assert isinstance(waiting.outcome, ClosedError)


@pytest.mark.parametrize("seed", range(8))
def test_close_at_any_moment(file: Path, seed: int) -> None:
    rng = random.Random(seed)
    slabs = slabs_of(file, [3, 2, 4, 3, 6])
    with Reader([file], direct=False, num_workers=2, chunk_bytes=CHUNK_BYTES) as reader:
        streamer = new_streamer(slabs, reader, rng.randrange(3))
        streamer.start()

        def walk_forever() -> None:
            while True:
                visit(streamer, slabs, rng.randrange(5))

        walking = Waiting(walk_forever)
        time.sleep(rng.random() / 50)
        assert Waiting(streamer.close).result() is None
        assert isinstance(walking.result(), ClosedError)


def test_closing_is_idempotent_and_final(file: Path) -> None:
    slabs = slabs_of(file, [2] * 2)
    streamer = new_streamer(slabs, FakeReader(slabs, eager=True), prefetch=1)
    lease = streamer.lease(0)
    streamer.close()
    streamer.close()
    lease.end()
    with pytest.raises(ClosedError, match=r"from_pretrained"):
        streamer.lease(0)


def test_close_skips_what_has_not_been_read(file: Path) -> None:
    slabs = slabs_of(file, [2] * 4)
    reader = FakeReader(slabs)
    streamer = new_streamer(slabs, reader, prefetch=3)
    streamer.start()
    requests = list(reader.requests)
    assert len(requests) == 3
    closing_ends(streamer, reader)
    assert all(request.job.cancelled for request in requests)
    assert streamer.stats.streamed_bytes == 0


def test_two_threads_that_need_different_batches_take_turns(file: Path) -> None:
    slabs = slabs_of(file, [3] * 4)
    with Reader([file], direct=False, num_workers=2, chunk_bytes=CHUNK_BYTES) as reader:
        streamer = new_streamer(slabs, reader, prefetch=1)

        def walk(batches: Sequence[int]) -> bool:
            right = True
            for batch in list(batches) * 50:
                right &= visit(streamer, slabs, batch)
            return right

        walks = [Waiting(lambda: walk([0, 1])), Waiting(lambda: walk([2, 3]))]
        assert [walking.result() for walking in walks] == [True, True]
        streamer.close()


# ------------------------------------------------------------------------------------------------------------- leases


def test_a_batch_stays_for_as_long_as_anybody_holds_it(file: Path) -> None:
    """Several at once, one of them twice, taken and given back by different threads, while others pass by."""
    slabs = slabs_of(file, [2] * 5)
    streamer = new_streamer(slabs, FakeReader(slabs, eager=True), prefetch=1, ring_pages=8)
    streamer.start()
    first = streamer.lease(1)
    other = Waiting(lambda: streamer.lease(1)).result()
    third = Waiting(lambda: streamer.lease(3)).result()
    assert isinstance(other, Lease)
    assert isinstance(third, Lease)

    def others_pass_by() -> None:
        for batch in [0, 2, 4] * 5:
            assert visit(streamer, slabs, batch)
            assert is_right(other.region, slabs[1])
            assert is_right(third.region, slabs[3])

    others_pass_by()
    for _ in range(2):  # the second time nobody gives back what another holds
        first.end()
        others_pass_by()
    assert Waiting(third.end).result() is None
    other.end()
    assert not any(region.users for region in streamer._regions.values())
    assert all(visit(streamer, slabs, batch) for batch in [0, 2, 4, 1, 3])


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_thread_that_has_the_ring_itself_is_told_so(file: Path, prefetch: int) -> None:
    slabs = slabs_of(file, [2, 2, 4])
    streamer = new_streamer(slabs, FakeReader(slabs, eager=True), prefetch, ring_pages=4)
    streamer.start()
    lease = streamer.lease(0)

    def asks_for_too_much() -> None:
        with streamer.lease(0), streamer.lease(2):
            pass

    outcome = Waiting(asks_for_too_much)
    until(lambda: outcome.outcome is not None or len(streamer._regions[0].users) == 2)
    lease.end()
    error = outcome.result()
    assert isinstance(error, BudgetError)
    for said in ("batch 2 needs 16.0 KiB", "ring of 16.0 KiB", "batch 0 (8.0 KiB)", "max_memory"):
        assert said in str(error)
    assert all(visit(streamer, slabs, batch) for batch in range(3)), "what was refused has left something behind"


def test_of_two_threads_that_wait_for_each_other_one_is_told_so(file: Path) -> None:
    """Whoever closes the circle; what it holds, it gives back, and the other one goes on."""
    slabs = slabs_of(file, [2] * 4)
    streamer = new_streamer(slabs, FakeReader(slabs, eager=True), prefetch=0, ring_pages=4)
    both = threading.Barrier(2)

    def hold(mine: int, next_one: int) -> bool:
        with streamer.lease(mine) as region:
            both.wait(PATIENCE)
            return visit(streamer, slabs, next_one) and is_right(region, slabs[mine])

    outcomes = [one.result() for one in [Waiting(lambda: hold(0, 2)), Waiting(lambda: hold(1, 3))]]
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["BudgetError", "bool"]
    assert True in outcomes


def test_a_lease_whose_thread_has_ended_is_not_waited_for(file: Path) -> None:
    slabs = slabs_of(file, [2] * 2)
    streamer = new_streamer(slabs, FakeReader(slabs, eager=True), prefetch=0)
    left = Waiting(lambda: streamer.lease(0))
    lease = left.result()
    left.join(PATIENCE)
    assert isinstance(Waiting(lambda: streamer.lease(1)).result(), BudgetError)
    assert isinstance(lease, Lease)
    lease.end()
    assert visit(streamer, slabs, 1)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_threads_with_leases_all_come_to_their_end(file: Path, seed: int, at_once: int) -> None:
    """With one at once, somebody can always go on, and none is refused. With several, one may be, and none hangs."""
    rng = random.Random(seed)
    slabs = slabs_of(file, [3, 2, 4, 3, 6])
    with Reader([file], direct=False, num_workers=2, chunk_bytes=CHUNK_BYTES) as reader:
        streamer = new_streamer(slabs, reader, prefetch=seed % 3)

        def look(batches: Sequence[int]) -> bool:
            with ExitStack() as held:
                try:
                    regions = [held.enter_context(streamer.lease(batch)) for batch in batches]
                except BudgetError:
                    return at_once > 1
                return all(is_right(region, slabs[batch]) for batch, region in zip(batches, regions, strict=True))

        def walk(batches: Sequence[int]) -> bool:
            return all(look(batches[start : start + at_once]) for start in range(0, len(batches), at_once))

        walks = [Waiting(functools.partial(walk, rng.choices(range(5), k=60))) for _ in range(4)]
        assert [walking.result() for walking in walks] == [True] * 4
        streamer.close()
