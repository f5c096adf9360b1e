"""Reads land to the byte, whatever the pieces; and whatever goes wrong, everybody who waits is told, once."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airstream.errors import BudgetError, CheckpointError, CheckpointNotFoundError, ClosedError, ReadError
from airstream.transfer import files
from airstream.transfer.files import PAGE_BYTES, WeightFile
from airstream.transfer.host_memory import HostBuffer
from airstream.transfer.jobs import Job, ReadCancelled
from airstream.transfer.landing import HostLanding, Staging
from airstream.transfer.piece import Cast, Piece, split
from airstream.transfer.reader import Reader
from tests.stand_ins.process import descriptors, reader_threads

FILE_BYTES = 200_001  # ends neither on a page nor on a sector
CONTENT = random.Random(0).randbytes(FILE_BYTES)
CHUNKS = (4096, 8192, 12288, 65536)
UNTOUCHED = 0xA5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """One that the test may damage."""
    path = tmp_path / "own.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not reader_threads()


def new_memory(nbytes: int) -> torch.Tensor:
    return HostBuffer(nbytes).tensor.fill_(UNTOUCHED)


def landing(memory: torch.Tensor, chunk_bytes: int) -> HostLanding:
    return HostLanding(memory, Staging(chunk_bytes))


def read_bytes(reader: Reader, pieces: Sequence[Piece], nbytes: int) -> bytes:
    """What lies in fresh memory after `pieces` have been read into it."""
    memory = new_memory(nbytes)
    reader.read(pieces, landing(memory, reader.chunk_bytes))
    return memory.numpy().tobytes()


class Gate:
    """A landing whose reads wait until the gate is opened, and which notes what landed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.landed_at: list[int] = []
        self._error = error

    def window(self, worker: int, piece: Piece, direct: bool) -> memoryview:
        self.reached.set()
        assert self.opened.wait(30)
        if self._error is not None:
            raise self._error
        return memoryview(bytearray(piece.nbytes))

    def landed(self, worker: int, piece: Piece, direct: bool) -> None:
        self.landed_at.append(piece.offset)


class Calls:
    """An `on_done` that counts."""

    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []
        self.done = threading.Event()

    def __call__(self, error: BaseException | None) -> None:
        self.errors.append(error)
        self.done.set()

    def only(self) -> BaseException | None:
        """What the one call there was brought."""
        assert self.done.wait(30), "on_done was not called"
        time.sleep(0.01)  # a second call would come at once
        assert len(self.errors) == 1
        return self.errors[0]


# ------------------------------------------------------------------------------------------------- bytes land exactly


@st.composite
def scattered(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(offset, nbytes, target) of pieces whose targets do not overlap, in any order; some could land in place."""
    pieces, end = [], draw(st.integers(0, 5000))
    for _ in range(draw(st.integers(0, 6))):
        edge = st.sampled_from([0, 1, 511, 512, 4095, 4096, 4097, 65536, FILE_BYTES - 1])
        offset = draw(st.integers(0, FILE_BYTES - 1) | edge)
        nbytes = draw(st.integers(0, FILE_BYTES - offset) | st.integers(0, min(9000, FILE_BYTES - offset)))
        end += draw(st.integers(0, 3))
        if draw(st.booleans()):
            end += (offset - end) % PAGE_BYTES
        pieces.append((offset, nbytes, end))
        end += nbytes
    return draw(st.permutations(pieces))


@settings(max_examples=120, deadline=None)
@given(places=scattered(), direct=st.booleans(), chunk_bytes=st.sampled_from(CHUNKS), num_workers=st.integers(1, 5))
def test_bytes_land_where_they_belong_and_nowhere_else(
    file: Path, places: list[tuple[int, int, int]], direct: bool, chunk_bytes: int, num_workers: int
) -> None:
    size = max((target + nbytes for _, nbytes, target in places), default=0) + 100
    expected = bytearray([UNTOUCHED]) * size
    for offset, nbytes, target in places:
        expected[target : target + nbytes] = CONTENT[offset : offset + nbytes]
    pieces = [Piece(file, *place) for place in places]
    with Reader([file], direct, num_workers, chunk_bytes) as reader:
        assert read_bytes(reader, pieces, size) == expected
        assert reader.bytes_read == sum(piece.nbytes for piece in pieces)


FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CASTS = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32"), ("float32", "float16")]
NUM_ELEMENTS = 40_000


@pytest.fixture(scope="module")
def elements(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """By type: a file of random numbers behind three other bytes, and the numbers."""
    folder, made = tmp_path_factory.mktemp("elements"), {}
    for name, dtype in FLOATS.items():
        numbers = (torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
        (folder / name).write_bytes(b"abc" + numbers.view(torch.uint8).numpy().tobytes())
        made[name] = (folder / name, numbers)
    return made


@settings(max_examples=80, deadline=None)
@given(
    cast=st.sampled_from(CASTS),
    start=st.integers(0, NUM_ELEMENTS - 1),
    count=st.integers(0, NUM_ELEMENTS),
    place=st.integers(0, 3000),
    direct=st.booleans(),
    chunk_bytes=st.sampled_from(CHUNKS),
)
def test_casts_equal_those_of_torch(
    elements: dict[str, tuple[Path, torch.Tensor]],
    cast: tuple[str, str],
    start: int,
    count: int,
    place: int,
    direct: bool,
    chunk_bytes: int,
) -> None:
    (path, numbers), target = elements[cast[0]], FLOATS[cast[1]]
    wanted = numbers[start : start + count]
    piece = Piece(
        path,
        3 + start * numbers.itemsize,
        wanted.nbytes,
        place * target.itemsize,
        Cast(*cast, numbers.itemsize, target.itemsize),
    )
    memory = new_memory((place + len(wanted)) * target.itemsize + 100)
    with Reader([path], direct, 3, chunk_bytes) as reader:
        reader.read([piece], landing(memory, chunk_bytes))
    end = piece.target + piece.target_bytes
    assert torch.equal(memory[piece.target : end].view(target), wanted.to(target))
    assert bool((memory[: piece.target] == UNTOUCHED).all())
    assert bool((memory[end:] == UNTOUCHED).all())


@given(
    offset=st.integers(0, 100_000),
    num_items=st.integers(0, 50_000),
    cast=st.sampled_from([None, Cast("bfloat16", "float32", 2, 4), Cast("float32", "bfloat16", 4, 2)]),
    chunk_bytes=st.sampled_from(CHUNKS),
)
def test_split_covers_a_piece_in_aligned_parts(
    offset: int, num_items: int, cast: Cast | None, chunk_bytes: int
) -> None:
    item = cast.source_item_bytes if cast else 1
    piece = Piece(Path("x"), offset, num_items * item, 64, cast)
    parts = split(piece, chunk_bytes)
    position, target = piece.offset, piece.target
    for part in parts:
        assert (part.offset, part.target) == (position, target)
        assert 0 < part.nbytes <= chunk_bytes
        assert part.nbytes % item == 0
        position, target = position + part.nbytes, target + part.target_bytes
    assert (position, target) == (piece.offset + piece.nbytes, piece.target + piece.target_bytes)
    if cast is None:
        assert all(part.offset % chunk_bytes == 0 for part in parts[1:])


def test_many_jobs_from_many_threads(file: Path) -> None:
    wrong: list[int] = []

    def read_some(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            offset = rng.randrange(FILE_BYTES)
            nbytes = rng.randrange(FILE_BYTES - offset)
            if read_bytes(reader, [Piece(file, offset, nbytes, 0)], nbytes) != CONTENT[offset : offset + nbytes]:
                wrong.append(offset)

    with Reader([file], direct=True, chunk_bytes=8192) as reader:
        threads = [threading.Thread(target=read_some, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ------------------------------------------------------------------------------------------ disks that do not behave

PREADV = pytest.mark.skipif(not files.HAS_PREADV, reason="there is no preadv to fail")
BOTH_WAYS = pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])


def whole(path: Path) -> list[Piece]:
    return [Piece(path, 0, FILE_BYTES, 0)]


@PREADV
@BOTH_WAYS
def test_short_reads_are_continued(own_file: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, granule = random.Random(5), 512 if direct else 1
    counts: list[int] = []
    with own_file.open("rb") as plain, Reader([own_file], direct, 2, 16384) as reader:

        def preadv(_: int, buffers: list[memoryview], offset: int) -> int:
            (view,) = buffers
            size = max(granule, rng.randrange(len(view) + 1) // granule * granule)
            data = os.pread(plain.fileno(), size, offset)
            view[: len(data)] = data
            counts.append(len(data))
            return len(data)

        monkeypatch.setattr(os, "preadv", preadv)
        assert read_bytes(reader, whole(own_file), FILE_BYTES) == CONTENT
    assert len(counts) > 2 * FILE_BYTES / 16384, "the reads were not short"


def fail_once(monkeypatch: pytest.MonkeyPatch, where: int, code: int = errno.EIO) -> None:
    """Let the first read that covers byte `where` fail."""
    real, failed = os.preadv, threading.Event()

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= where < offset + len(buffers[0]) and not failed.is_set():
            failed.set()
            raise OSError(code, os.strerror(code))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


@PREADV
@BOTH_WAYS
@pytest.mark.parametrize("where", [0, 100_000, FILE_BYTES - 1])
def test_a_failed_read_is_reported_and_can_be_tried_again(
    own_file: Path, direct: bool, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reader([own_file], direct, chunk_bytes=16384) as reader:
        fail_once(monkeypatch, where)
        with pytest.raises(ReadError, match=os.strerror(errno.EIO)) as caught:
            read_bytes(reader, whole(own_file), FILE_BYTES)
        start, nbytes = range_named_in(str(caught.value))
        assert start <= where < start + nbytes
        assert str(own_file) in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert read_bytes(reader, whole(own_file), FILE_BYTES) == CONTENT


def range_named_in(message: str) -> tuple[int, int]:
    """The offset and the length in "reading 1,234 bytes at 5,678 of ..."."""
    words = message.replace(",", "").split()
    return int(words[words.index("at") + 1]), int(words[words.index("bytes") - 1])


@BOTH_WAYS
@pytest.mark.parametrize("size", [0, 1000, 4096, 150_000, FILE_BYTES - 1])
def test_a_file_that_got_shorter_is_reported(own_file: Path, direct: bool, size: int) -> None:
    with Reader([own_file], direct, chunk_bytes=16384) as reader:
        os.truncate(own_file, size)
        # What its first part gives is refused too: somebody has been at it.
        with pytest.raises((ReadError, CheckpointError), match=r"file ends|replaced or changed") as caught:
            read_bytes(reader, whole(own_file), FILE_BYTES)
        if isinstance(caught.value, ReadError):
            start, nbytes = range_named_in(str(caught.value))
            assert start + nbytes > size
        assert str(own_file) in str(caught.value)
        own_file.write_bytes(CONTENT)
        with pytest.raises(CheckpointError, match="replaced or changed"):
            read_bytes(reader, whole(own_file), FILE_BYTES)


O_DIRECT = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there are no direct reads to refuse")


def refuse_direct(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refusing)


@O_DIRECT
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_refuses_direct_reads(file: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch, code)
    with Reader([file], direct=True, chunk_bytes=8192) as reader:
        assert not reader.direct
        assert read_bytes(reader, whole(file), FILE_BYTES) == CONTENT


@O_DIRECT
def test_a_file_that_cannot_be_opened(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch, errno.EACCES)
    with pytest.raises(ReadError, match=os.strerror(errno.EACCES)) as caught:
        Reader([file], direct=True)
    assert str(file) in str(caught.value)


def test_without_preadv_threads_take_turns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HAS_PREADV", False)
    monkeypatch.delattr(os, "preadv", raising=False)
    with Reader([file], direct=False, num_workers=5, chunk_bytes=4096) as reader:
        for _ in range(5):
            assert read_bytes(reader, whole(file), FILE_BYTES) == CONTENT


def test_an_error_of_the_landing_reaches_whoever_waits(file: Path) -> None:
    gate = Gate(error=MemoryError("no room"))
    gate.opened.set()
    with Reader([file], direct=False) as reader:
        with pytest.raises(BudgetError, match="has no memory left") as caught:
            reader.read(whole(file), gate)
        assert str(caught.value.__cause__) == "no room"
        assert read_bytes(reader, whole(file), FILE_BYTES) == CONTENT


# ----------------------------------------------------------------------------------------- cancelling and closing


def submit_behind(reader: Reader, file: Path, gate: Gate, num_jobs: int) -> tuple[list[Job], list[Calls]]:
    """`num_jobs` jobs of three chunks each, the first of which has reached `gate`, where the only worker waits."""
    calls = [Calls() for _ in range(num_jobs)]
    pieces = [Piece(file, 0, 3 * reader.chunk_bytes, 0)]
    jobs = [reader.submit(pieces, gate, on_done) for on_done in calls]
    assert gate.reached.wait(30)
    return jobs, calls


def test_a_cancelled_job_is_skipped_and_told_once(file: Path) -> None:
    gate = Gate()
    with Reader([file], direct=False, num_workers=1, chunk_bytes=4096) as reader:
        jobs, calls = submit_behind(reader, file, gate, num_jobs=3)
        jobs[1].cancel()
        jobs[1].cancel()
        gate.opened.set()
        assert calls[0].only() is None
        assert isinstance(calls[1].only(), ReadCancelled)
        assert calls[2].only() is None
        assert reader.bytes_read == 2 * 3 * 4096


def test_a_job_can_be_cancelled_while_it_is_read(file: Path) -> None:
    gate = Gate()
    with Reader([file], direct=False, num_workers=1, chunk_bytes=4096) as reader:
        jobs, calls = submit_behind(reader, file, gate, num_jobs=1)
        jobs[0].cancel()
        gate.opened.set()
        assert isinstance(calls[0].only(), ReadCancelled)
    assert gate.landed_at == [0]


def test_after_an_error_the_rest_of_the_job_is_not_read(file: Path) -> None:
    gate = Gate(error=OSError("first"))
    with Reader([file], direct=False, num_workers=1, chunk_bytes=4096) as reader:
        _, calls = submit_behind(reader, file, gate, num_jobs=1)
        gate.opened.set()
        error = calls[0].only()
        assert isinstance(error, ReadError)
        assert str(error.__cause__) == "first"
        assert reader.bytes_read == 0


def test_cancelling_what_is_done_does_nothing(file: Path) -> None:
    gate, calls = Gate(), Calls()
    gate.opened.set()
    with Reader([file], direct=False) as reader:
        job = reader.submit(whole(file), gate, calls)
        assert calls.only() is None
        job.cancel()
        assert calls.only() is None


@pytest.mark.parametrize("num_workers", [1, 3])
def test_close_ends_queued_work_and_all_threads(file: Path, num_workers: int) -> None:
    gate = Gate()
    reader = Reader([file], direct=False, num_workers=num_workers, chunk_bytes=4096)
    _, calls = submit_behind(reader, file, gate, num_jobs=20)
    assert len(reader_threads()) == num_workers
    closing = threading.Thread(target=reader.close)
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive(), "close() did not wait for the read under way"
    gate.opened.set()
    closing.join(30)
    assert not closing.is_alive()
    assert not reader_threads()
    first, *waiting = [on_done.only() for on_done in calls]
    assert first is None or isinstance(first, ReadCancelled)  # three workers may have been at its three chunks
    assert all(isinstance(error, ReadCancelled) for error in waiting)
    assert descriptors(file.parent) == []


def test_a_closed_reader_refuses_work(file: Path) -> None:
    reader = Reader([file], direct=False)
    reader.close()
    reader.close()
    with pytest.raises(ClosedError):
        reader.submit(whole(file), Gate(), Calls())
    with pytest.raises(ClosedError):
        reader.read(whole(file), Gate())


def test_close_from_several_threads(file: Path) -> None:
    reader = Reader([file], direct=False)
    threads = [threading.Thread(target=reader.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert descriptors(file.parent) == []


def test_urgent_work_overtakes(file: Path) -> None:
    gate, last = Gate(), Calls()
    with Reader([file], direct=False, num_workers=1, chunk_bytes=4096) as reader:
        reader.submit([Piece(file, 0, 1, 0)], gate, Calls())
        assert gate.reached.wait(30)
        reader.submit([Piece(file, 10, 1, 0), Piece(file, 20, 1, 0)], gate, last)
        reader.submit([Piece(file, 30, 1, 0), Piece(file, 40, 1, 0)], gate, Calls(), urgent=True)
        gate.opened.set()
        last.only()
    assert gate.landed_at == [0, 30, 40, 10, 20]


@pytest.mark.parametrize("pieces", [[], [(5, 0, 0)]], ids=["no piece", "an empty piece"])
def test_nothing_to_read_is_done_at_once(file: Path, pieces: list[tuple[int, int, int]]) -> None:
    calls = Calls()
    with Reader([file], direct=True) as reader:
        reader.submit([Piece(file, *piece) for piece in pieces], Gate(), calls)
        assert calls.only() is None


def test_a_missing_file_leaves_nothing_behind(file: Path) -> None:
    before = threading.active_count()
    with pytest.raises(CheckpointNotFoundError, match=r"gone\.bin is missing"):
        Reader([file, file.parent / "gone.bin"], direct=True)
    assert threading.active_count() == before
    assert descriptors(file.parent) == []


@BOTH_WAYS
def test_an_open_reader_has_each_file_open_once(file: Path, direct: bool) -> None:
    with Reader([file], direct):
        assert descriptors(file.parent) == ([str(file)] if sys.platform == "linux" else [])
    assert descriptors(file.parent) == []


def test_windows_are_aligned_for_direct_reads(file: Path) -> None:
    """What a landing promises: the window's address equals the offset modulo the page size, or it is whole pages."""
    memory = new_memory(FILE_BYTES)
    target = landing(memory, 8192)
    for offset, place in [(0, 0), (5, 5), (4096, 17), (12345, 4096), (8191, 1)]:
        window = target.window(0, Piece(file, offset, 100, place), True)
        in_place = (place - offset) % PAGE_BYTES == 0
        pages = -(-(offset + 100) // PAGE_BYTES) - offset // PAGE_BYTES
        assert (address(window) - (offset if in_place else 0)) % PAGE_BYTES == 0
        assert len(window) == (100 if in_place else pages * PAGE_BYTES)


def test_what_is_staged_is_read_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page at either end, read by itself, would wait in the disk's queue as long as a large read."""
    reads: list[tuple[int, int]] = []
    real = WeightFile.read_into

    def read_into(self: WeightFile, view: memoryview, offset: int, needed: int) -> None:
        reads.append((offset, needed))
        real(self, view, offset, needed)

    monkeypatch.setattr(WeightFile, "read_into", read_into)
    offset, nbytes = 3 * PAGE_BYTES + 5, 2 * PAGE_BYTES + 100
    with Reader([file], direct=True) as reader:
        if not reader.direct:
            pytest.skip("the file system refuses direct reads")
        assert (
            read_bytes(reader, [Piece(file, offset, nbytes, 17)], nbytes + 17)[17:] == CONTENT[offset : offset + nbytes]
        )
    assert reads == [(3 * PAGE_BYTES, 5 + nbytes)]


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


# -------------------------------------------------------------------------------------------- a bounded set of files


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Ten files, each of which says in every byte which it is."""
    paths = [tmp_path / f"shard-{number}.bin" for number in range(10)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number + 1]) * 20_000)
    return paths


@BOTH_WAYS
@pytest.mark.parametrize("limit", [1, 3, 10, 64])
def test_at_most_so_many_files_are_open(shards: list[Path], limit: int, direct: bool) -> None:
    with Reader(shards, direct, num_workers=1, chunk_bytes=4096, max_open_files=limit) as reader:
        for _ in range(3):
            for number, path in enumerate(shards):
                assert read_bytes(reader, [Piece(path, 1, 19_999, 0)], 19_999) == bytes([number + 1]) * 19_999
                if sys.platform == "linux":
                    assert len(descriptors(shards[0].parent)) == min(limit, len(shards))
    assert descriptors(shards[0].parent) == []


def test_files_in_use_are_not_closed_for_others(shards: list[Path]) -> None:
    """More threads than there may be files, all of them in the middle of a read."""
    pieces = [Piece(path, 5, 18_000, number * 18_000) for number, path in enumerate(shards)] * 30
    with Reader(shards, direct=False, num_workers=6, chunk_bytes=4096, max_open_files=2) as reader:
        memory = new_memory(len(shards) * 18_000)
        reader.read(pieces, landing(memory, 4096))
    for number, part in enumerate(memory.view(len(shards), 18_000)):
        assert bool((part == number + 1).all())


def test_a_file_is_kept_open_while_it_is_used_often(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = list[str](), os.open

    def counting(path: Any, *rest: Any, **options: Any) -> int:
        opened.append(str(path))
        return real(path, *rest, **options)

    with Reader(shards, direct=False, num_workers=1, max_open_files=3) as reader:
        monkeypatch.setattr(os, "open", counting)
        for path in shards:
            read_bytes(reader, [Piece(shards[0], 0, 10, 0), Piece(path, 0, 10, 0)], 10)
    assert opened == [str(path) for path in [shards[0], *shards[1:]]]


def overwrite(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(b"x" * path.stat().st_size)
    other.replace(path)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@BOTH_WAYS
@pytest.mark.parametrize("change", [overwrite, replace, shorten])
def test_a_file_that_changed_while_it_was_closed_is_one_clear_error(
    shards: list[Path], change: Callable[[Path], None], direct: bool
) -> None:
    with Reader(shards, direct, num_workers=1, max_open_files=2) as reader:
        time.sleep(0.02)  # clocks of file systems are coarse
        change(shards[0])
        for _ in range(2):
            with pytest.raises(
                CheckpointError, match=r"shard-0\.bin is not the file that was opened.*Load the model again"
            ):
                read_bytes(reader, [Piece(shards[0], 0, 10, 0)], 10)
        assert read_bytes(reader, [Piece(shards[5], 0, 10, 0)], 10) == bytes([6]) * 10


def test_a_file_that_went_while_it_was_closed(shards: list[Path]) -> None:
    with Reader(shards, direct=False, num_workers=1, max_open_files=2) as reader:
        shards[0].unlink()
        with pytest.raises(CheckpointNotFoundError, match=r"shard-0\.bin is missing"):
            read_bytes(reader, [Piece(shards[0], 0, 10, 0)], 10)


@O_DIRECT
@PREADV
def test_a_file_that_was_replaced_before_it_fell_back_is_an_error(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reader(shards, direct=True, num_workers=1) as reader:
        if not reader.direct:
            pytest.skip("this file system refuses direct reads")
        replace(shards[0])
        assert read_bytes(reader, [Piece(shards[0], 0, 10, 0)], 10) == b"\1" * 10, "the open one is still the old one"
        fail_once(monkeypatch, 0, errno.EINVAL)
        with pytest.raises(CheckpointError, match=r"shard-0\.bin is not the file that was opened"):
            read_bytes(reader, [Piece(shards[0], 0, 10, 0)], 10)


@O_DIRECT
@PREADV
def test_two_threads_are_refused_direct_reads_at_once(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both asked while the file was direct; whoever comes second finds that it no longer is."""
    barrier, real, num_refused = threading.Barrier(2), os.preadv, [0]

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if num_refused[0] < 2:
            num_refused[0] += 1
            barrier.wait(30)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset)

    with Reader([own_file], direct=True, num_workers=2, chunk_bytes=16384) as reader:
        if not reader.direct:
            pytest.skip("this file system refuses direct reads")
        monkeypatch.setattr(os, "preadv", preadv)
        assert read_bytes(reader, whole(own_file), FILE_BYTES) == CONTENT
        assert not reader.direct
