"""Headers of GGUF files: what a sound file says, and that no other one is believed."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from airstream.checkpoint.gguf import GgufIndex, read_gguf_header
from airstream.errors import CheckpointError, CheckpointNotFoundError, UnsupportedError

F32 = GGMLQuantizationType.F32
Q8_0 = GGMLQuantizationType.Q8_0


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(
    entries: list[bytes], tensors: list[bytes], version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + b"".join(entries) + b"".join(tensors)


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes = b"a", dims: tuple[int, ...] = (8, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = entry(b"general.architecture", 8, text(b"llama"))


def write(file: Path, raw: bytes, num_data_bytes: int = 256) -> Path:
    file.write_bytes(raw + bytes(-len(raw) % 32) + bytes(num_data_bytes))
    return file


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "file.gguf"


def write_some(file: Path, split: tuple[int, int, int] | None = None, names: tuple[str, ...] = ("a", "b")) -> Path:
    writer = GGUFWriter(file, "llama")
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.words", ["one", "two"])
    writer.add_float32("a.float", 0.5)
    if split is not None:
        number, count, total = split
        (writer.add_string if isinstance(number, str) else writer.add_uint16)("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", total)
    for name in names:
        values = np.arange(5 * 64, dtype=np.float32).reshape(5, 64)
        writer.add_tensor(f"{name}.plain", values[:, :3].copy())
        writer.add_tensor(f"{name}.packed", quantize(values, Q8_0), raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_places_are_those_of_the_reference_reader(tmp_path: Path) -> None:
    file = write_some(tmp_path / "x.gguf")
    index = GgufIndex.open(file)
    assert (index.architecture, index.first, index.files) == ("llama", file, (file,))
    reference = {entry.name: entry for entry in GGUFReader(file).tensors}
    assert set(index) == set(reference)
    assert len(index) == 4
    for name, stored in index.items():
        assert stored.offset == reference[name].data_offset
        assert stored.nbytes == reference[name].n_bytes
        assert stored.dtype == reference[name].tensor_type.name
        assert stored.shape == tuple(int(size) for size in reversed(reference[name].shape))


def test_split_files_are_one_checkpoint(tmp_path: Path) -> None:
    for number in range(3):
        name = f"x-{number + 1:05}-of-00003.gguf"
        write_some(tmp_path / name, (number, 3, 6), (f"t{number}",))
    index = GgufIndex.open(tmp_path / "x-00002-of-00003.gguf")
    assert index.first.name == "x-00001-of-00003.gguf"
    assert (len(index.files), len(index)) == (3, 6)
    (tmp_path / "x-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"lacks 1 of the 3 files.*x-00003-of-00003\.gguf"):
        GgufIndex.open(tmp_path / "x-00001-of-00003.gguf")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (((1, 2, 4), (1, 2, 4)), "file 2 of 2, its name that it is file 1 of 2"),
        (((0, 3, 4), (1, 3, 4)), "file 1 of 3"),
        (((0, 2, 5), (1, 2, 5)), "promises 5 as its number of tensors, and has 4"),
        ((("one", 2, 4), (1, 2, 4)), "split.no is 'one'"),
    ],
)
def test_split_files_must_belong_together(tmp_path: Path, splits: Any, message: str) -> None:
    for number, split in enumerate(splits):
        write_some(tmp_path / f"x-{number + 1:05}-of-00002.gguf", split, (f"t{number}",))
    with pytest.raises(CheckpointError, match=message):
        GgufIndex.open(tmp_path / "x-00001-of-00002.gguf")


def test_a_tensor_is_in_one_file(tmp_path: Path) -> None:
    for number in range(2):
        write_some(tmp_path / f"x-{number + 1:05}-of-00002.gguf", (number, 2, 4), ("same",))
    with pytest.raises(CheckpointError, match="is in two files"):
        GgufIndex.open(tmp_path / "x-00001-of-00002.gguf")


def test_a_renamed_part_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="file 1 of 3, its name that it is file 1 of 1"):
        GgufIndex.open(write_some(tmp_path / "x.gguf", (0, 3, 6)))


HUGE = 1 << 62
BROKEN = {
    "magic": (b"GGML" + bytes(60), "does not begin like"),
    "version": (header([], [], version=1), "of version 1"),
    "endian": (header([], [], version=3 << 24), "big-endian"),
    "entries": (header([], [], counts=(0, HUGE)), "claims .* metadata entries"),
    "tensors": (header([ARCHITECTURE], [], counts=(HUGE, 1)), "claims .* tensors"),
    "key": (header([struct.pack("<Q", HUGE)], [b"x" * 99], counts=(0, 1)), "claims 4,611"),
    "string": (header([entry(b"k", 8, struct.pack("<Q", HUGE))], [b"x" * 99], counts=(0, 1)), "goes on for"),
    "array": (header([entry(b"k", 9, struct.pack("<IQ", 12, HUGE))], [b"x" * 99], counts=(0, 1)), "goes on for"),
    "strings": (header([entry(b"k", 9, struct.pack("<IQ", 8, HUGE))], [b"x" * 99], counts=(0, 1)), "claims .* values"),
    "deep": (header([entry(b"k", 9, struct.pack("<IQ", 9, 1) * 99)], [], counts=(0, 1)), "more than 4 deep"),
    "kind": (header([entry(b"k", 77, b"")], []), "type 77"),
    "twice": (header([ARCHITECTURE, ARCHITECTURE], []), "twice"),
    "utf8": (header([entry(b"\xff", 4, bytes(4))], []), "not UTF-8"),
    "architecture": (header([entry(b"general.architecture", 9, bytes(16))], []), "is of type 9"),
    "alignment": (header([ARCHITECTURE, entry(b"general.alignment", 4, struct.pack("<I", 24))], []), "alignment is 24"),
    "zero": (header([ARCHITECTURE, entry(b"general.alignment", 4, bytes(4))], []), "alignment is 0"),
    "word": (header([ARCHITECTURE, entry(b"general.alignment", 8, text(b"32"))], []), "alignment is '32'"),
    "dimensions": (header([ARCHITECTURE], [tensor(dims=(1,) * 5)]), "has 5 dimensions"),
    "no dimensions": (header([ARCHITECTURE], [tensor(dims=())]), "has 0 dimensions"),
    "large": (header([ARCHITECTURE], [tensor(dims=(HUGE, HUGE))]), "is truncated"),
    "outside": (header([ARCHITECTURE], [tensor(offset=HUGE)]), "is truncated"),
    "off": (header([ARCHITECTURE], [tensor(offset=8)]), "off 32"),
    "overlap": (header([ARCHITECTURE], [tensor(), tensor(b"b", offset=32)]), "'b' overlaps a"),
    "same name": (header([ARCHITECTURE], [tensor(), tensor(offset=64)]), "'a' is in it twice"),
    "blocks": (header([ARCHITECTURE], [tensor(dims=(33, 1), kind=8)]), "not whole Q8_0 blocks"),
    "endless": (
        header([entry(b"k", 9, struct.pack("<IQ", 8, 2_000_001))], [], counts=(0, 1)) + bytes(8 * 2_000_001),
        "more than 2,000,000 values",
    ),
    "too many": (
        header([ARCHITECTURE], [], counts=(70_000, 1)) + bytes(36 * 70_000),
        "claims 70,000 tensors; no file has more than 65,536",
    ),
    "nothing": (header([], []), "does not say what kind of model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_sound_is_refused(scratch: Path, case: str) -> None:
    raw, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message) as refusal:
        GgufIndex.open(write(scratch, raw))
    assert str(scratch) in str(refusal.value)


def test_types_that_cannot_be_streamed(scratch: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"tensor 'a' is of GGUF type 15.*Q4_K"):
        read_gguf_header(write(scratch, header([ARCHITECTURE], [tensor(kind=15)])))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        GgufIndex.open(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        GgufIndex.open(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="not one of 2 files"):
        GgufIndex.open(tmp_path / "x-00003-of-00002.gguf")


def read_or_refuse(file: Path) -> None:
    """Either the file is refused, or every tensor lies in it, apart from all others."""
    tracemalloc.start()
    try:
        tensors = read_gguf_header(file).tensors
    except (CheckpointError, UnsupportedError):
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20, "memory for what a header claims"
    end = 0
    for stored in tensors:
        assert end <= stored.offset
        assert stored.end <= file.stat().st_size
        end = stored.end


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=200))
def test_random_bytes(scratch: Path, raw: bytes) -> None:
    scratch.write_bytes(b"GGUF\x03\x00\x00\x00" + raw)
    read_or_refuse(scratch)


ODD_NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 9, 12, 31, 32, 33, 255, 1 << 31, (1 << 32) - 1, HUGE, (1 << 64) - 1])


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutated_files(scratch: Path, data: st.DataObject) -> None:
    words = entry(b"words", 9, struct.pack("<IQ", 8, 2) + text(b"x") + text(b"yz"))
    tensors = [tensor(), tensor(b"b", (32, 4), 8, 64), tensor(b"c", (2, 3, 4), 1, 224)]
    raw = bytearray(header([ARCHITECTURE, words], tensors))
    raw += bytes(-len(raw) % 32) + bytes(272)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw)))
        if data.draw(st.booleans()):
            word = struct.pack("<Q", data.draw(ODD_NUMBERS))
            raw[place : place + len(word)] = word
        else:
            raw[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    scratch.write_bytes(raw)
    read_or_refuse(scratch)
