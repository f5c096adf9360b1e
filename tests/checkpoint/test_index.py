"""Headers: what is right is read to the byte, and nothing that is wrong gets past, whatever is wrong with it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from airstream import AutoModel
from airstream.checkpoint import safetensors as index_module
from airstream.checkpoint.names import SHARD_INDEX, SINGLE_FILE
from airstream.checkpoint.safetensors import MAX_HEADER_BYTES, open_safetensors, read_header
from airstream.errors import CheckpointError, CheckpointNotFoundError
from tests.conftest import WriteTiny

Header = dict[str, Any]

VALID: Header = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def raw_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def write(file: Path, header: object, num_data_bytes: int = 32) -> Path:
    file.write_bytes(raw_header(header) + bytes(num_data_bytes))
    return file


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / SINGLE_FILE


def refused(file: Path, said: str) -> None:
    """`file` is refused with a message that names it and says `said`."""
    with pytest.raises(CheckpointError, match=said) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


# ------------------------------------------------------------------------------------------------------- what is right

HAND_WRITTEN = (
    b"\x60\x00\x00\x00\x00\x00\x00\x00"  # 96 bytes of header
    b'{"w":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]},'
    b'"__metadata__":{"format":"pt"}}        '
    b"\x80\x3f\x00\xc0"  # 1.0 and -2.0
)


def test_a_file_written_byte_by_byte(file: Path) -> None:
    file.write_bytes(HAND_WRITTEN)
    (tensor,) = read_header(file)
    assert (tensor.name, tensor.file, tensor.dtype, tensor.shape) == ("w", file, "BF16", (1, 2))
    assert (tensor.offset, tensor.nbytes, tensor.end) == (104, 4, 108)


GOLDEN_TENSORS = {
    "z": torch.arange(3, dtype=torch.uint8),
    "a.weight": torch.tensor([[1.0, -2.0]]),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 5, dtype=torch.bfloat16),
}
GOLDEN_HEADER = (
    b'{"scalar":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    b'"a.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]},'
    b'"empty":{"dtype":"BF16","shape":[0,5],"data_offsets":[16,16]},'
    b'"z":{"dtype":"U8","shape":[3],"data_offsets":[16,19]}}'
)


def test_a_file_written_by_safetensors(file: Path) -> None:
    save_file(GOLDEN_TENSORS, file)
    raw = file.read_bytes()
    padded = GOLDEN_HEADER.ljust(-(-len(GOLDEN_HEADER) // 8) * 8)
    assert raw[8 : 8 + len(padded)] == padded, "safetensors writes something else than it used to"
    tensors = {tensor.name: tensor for tensor in read_header(file)}
    assert tensors.keys() == GOLDEN_TENSORS.keys()
    for name, value in GOLDEN_TENSORS.items():
        stored = tensors[name]
        assert stored.shape == tuple(value.shape)
        assert raw[stored.offset : stored.end] == value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert [tensor.offset for tensor in read_header(file)] == sorted(tensor.offset for tensor in tensors.values())


@pytest.mark.parametrize("dtype", index_module.ITEM_BYTES)
def test_every_type_of_safetensors_has_its_size(file: Path, dtype: str) -> None:
    nbytes = 3 * index_module.ITEM_BYTES[dtype]
    write(file, {"w": entry(dtype, [3], [0, nbytes])}, nbytes)
    assert read_header(file)[0].nbytes == nbytes


def test_every_type_that_safetensors_writes_is_known(file: Path) -> None:
    types = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
    types += [torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    types += [torch.float8_e4m3fn, torch.float8_e5m2]
    save_file({str(dtype): torch.zeros(3).to(dtype) for dtype in types}, file)
    assert {tensor.name: tensor.nbytes for tensor in read_header(file)} == {str(t): 3 * t.itemsize for t in types}


def test_tensors_come_in_file_order(file: Path) -> None:
    write(file, {"late": entry(offsets=[8, 16]), "early": entry(offsets=[0, 8])})
    assert [tensor.name for tensor in read_header(file)] == ["early", "late"]


def test_an_index_is_a_mapping(file: Path) -> None:
    write(file, VALID)
    index = open_safetensors(file.parent)
    assert list(index) == ["a", "b"]
    assert len(index) == 2
    assert (index.files, index.nbytes) == ((file,), 32)
    assert index["b"].shape == (4,)
    with pytest.raises(KeyError):
        index["c"]


# ------------------------------------------------------------------------------------------- files that are not right


@pytest.mark.parametrize("num_bytes", [1, 7, 8, 20])
def test_a_file_that_ends_in_its_header(file: Path, num_bytes: int) -> None:
    file.write_bytes(raw_header(VALID)[:num_bytes])
    refused(file, rf"not a complete safetensors file.* {num_bytes:,}\b.*Download it again")


@pytest.mark.parametrize("num_missing", [1, 8, 31, 32])
def test_a_file_that_ends_in_its_data(file: Path, num_missing: int) -> None:
    write(file, VALID, 32 - num_missing)
    size = file.stat().st_size
    refused(file, rf"is truncated.* {size + num_missing:,} bytes .* has {size:,}\. Download it again")


@pytest.mark.parametrize("claimed", [0, 1, 30_000, MAX_HEADER_BYTES + 1, 1 << 40, (1 << 63) + 5, (1 << 64) - 1])
def test_an_absurd_header_length(file: Path, claimed: int) -> None:
    raw = bytearray(raw_header(VALID) + bytes(32))
    raw[:8] = struct.pack("<Q", claimed)
    file.write_bytes(raw)
    refused(file, f"claims {claimed:,} byte")


def test_a_header_above_the_limit_is_not_read(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        stream.truncate(2 * MAX_HEADER_BYTES)  # sparse: it is there, and takes no room
    tracemalloc.start()
    try:
        refused(file, f"claims {MAX_HEADER_BYTES + 1:,} bytes")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


UNSOUND: dict[str, tuple[bytes, str]] = {
    "zeros": (bytes(16), "not JSON"),
    "half": (b'{"a":{"dtype"', "not JSON"),
    "latin-1": (b'{"\xe9":1}', "not UTF-8 at byte 2"),
    "twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', "'a' is there twice"),
    "twice within": (b'{"a":{"dtype":"U8","shape":[1],"shape":[2],"data_offsets":[0,2]}}', "'shape' is there twice"),
    "deep": (b"[" * 200_000, "more than 32 deep"),
    "digits": (b'{"a":' + b"9" * 10_000 + b"}", "more than 100 digits"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1", "not JSON"),
}


@pytest.mark.parametrize(("text", "said"), UNSOUND.values(), ids=UNSOUND)
def test_a_header_that_is_not_sound(file: Path, text: bytes, said: str) -> None:
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    refused(file, said)


@pytest.mark.parametrize("header", [[], "a", 1, None, [["a", 1]]], ids=str)
def test_a_header_that_is_not_a_table(file: Path, header: object) -> None:
    write(file, header)
    with pytest.raises(CheckpointError, match=r"not a table|not a complete"):
        read_header(file)


MALFORMED = {
    "no entry": None,
    "a number": 5,
    "a list": [1, 2],
    "a string": "F32",
    "no dtype": {"shape": [2], "data_offsets": [0, 8]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 8]},
    "no offsets": {"dtype": "F32", "shape": [2]},
    "unknown dtype": entry("F33"),
    "lower-case dtype": entry("f32"),
    "dtype is a list": entry(["F32"]),
    "dtype is null": entry(None),
    "shape is a number": entry(shape=2),
    "shape is text": entry(shape="2"),
    "shape is null": entry(shape=None),
    "size is text": entry(shape=["2"]),
    "size is a float": entry(shape=[2.0]),
    "size is a bool": entry("U8", [True], [0, 1]),
    "size is negative": entry(shape=[-2], offsets=[0, -8]),
    "sizes are negative": entry(shape=[-1, -2]),
    "size is nested": entry(shape=[[2]]),
    "size is huge": entry(shape=[1 << 62, 1 << 62]),
    "one offset": entry(offsets=[8]),
    "three offsets": entry(offsets=[0, 8, 16]),
    "offsets are text": entry(offsets=["0", "8"]),
    "offsets are a string": entry("U8", [1], "01"),
    "offset is a bool": entry("U8", [1], [False, True]),
    "offset is a float": entry(offsets=[0.0, 8.0]),
    "offset is negative": entry(offsets=[-8, 0]),
    "offsets are reversed": entry(offsets=[8, 0]),
    "too few bytes": entry(offsets=[0, 4]),
    "too many bytes": entry(offsets=[0, 12]),
}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_entry_is_named(file: Path, value: object) -> None:
    write(file, {"fine": entry(offsets=[8, 16]), "the.tensor": value})
    refused(file, r"'the\.tensor' is malformed")


@pytest.mark.parametrize("offsets", [(4, 12), (0, 8), (7, 15)], ids=str)
def test_tensors_that_overlap_are_named(file: Path, offsets: tuple[int, int]) -> None:
    write(file, {"one": entry(), "other": entry(offsets=offsets)})
    refused(file, "'(one|other)' overlaps (one|other)")


def test_a_tensor_far_behind_the_end(file: Path) -> None:
    write(file, {"w": entry(offsets=[1 << 40, (1 << 40) + 8])})
    refused(file, "is truncated")


def test_a_missing_file_is_not_found(file: Path) -> None:
    refused(file, "missing")
    with pytest.raises(FileNotFoundError):
        read_header(file)
    with pytest.raises(CheckpointNotFoundError):
        read_header(file)


# --------------------------------------------------------------------------------------------------- several files


def write_sharded(folder: Path, weight_map: object, **shards: Header) -> Path:
    for name, header in shards.items():
        write(folder / f"{name}.safetensors", header)
    (folder / SHARD_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


ONE, OTHER = {"a": VALID["a"]}, {"b": VALID["b"]}


def test_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=ONE, y=OTHER, unlisted={"c": VALID["a"]})
    index = open_safetensors(tmp_path)
    assert {name: index[name].file.name for name in index} == {"a": "x.safetensors", "b": "y.safetensors"}
    assert index.files == (tmp_path / "x.safetensors", tmp_path / "y.safetensors")


def test_a_tensor_in_two_shards_is_taken_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=VALID, y=VALID)
    index = open_safetensors(tmp_path)
    assert {name: index[name].file.name for name in index} == {"a": "x.safetensors", "b": "y.safetensors"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=ONE)
    with pytest.raises(CheckpointNotFoundError, match=r"y\.safetensors is missing"):
        open_safetensors(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=ONE, y={"c": VALID["b"]})
    with pytest.raises(CheckpointError, match=r"y\.safetensors: tensor 'b' is missing"):
        open_safetensors(tmp_path)


def test_a_corrupt_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=ONE, y=OTHER)
    (tmp_path / "y.safetensors").write_bytes(b"oops")
    with pytest.raises(CheckpointError, match=r"y\.safetensors is text"):
        open_safetensors(tmp_path)


TRICKS = ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\..\\x", "x\0.safetensors", 5, None]
TRICKS += [["x.safetensors"], {}]


@pytest.mark.parametrize("shard", TRICKS, ids=repr)
def test_a_shard_outside_the_folder_is_not_opened(tmp_path: Path, shard: object) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(tmp_path / "x.safetensors", ONE)
    write_sharded(folder, {"a": shard})
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_safetensors(folder)


TWICE = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
NOT_AN_INDEX = [TWICE, "{", "[]", "{}", "null", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": "x"}']


@pytest.mark.parametrize("text", [*NOT_AN_INDEX, "[" * 99_999], ids=lambda text: text[:20])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / SHARD_INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not a shard index"):
        open_safetensors(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint: expected model\.safetensors") as caught:
        open_safetensors(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    write(tmp_path / "weights.safetensors", VALID)
    assert list(open_safetensors(tmp_path)) == ["a", "b"]


def test_several_files_without_an_index(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", ONE)
    write(tmp_path / "y.safetensors", OTHER)
    assert set(open_safetensors(tmp_path)) == {"a", "b"}


def test_a_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", ONE)
    write(tmp_path / "y.safetensors", VALID)
    with pytest.raises(CheckpointError, match=r"'a' is in two files, x\.safetensors and y\.safetensors"):
        open_safetensors(tmp_path)


def test_the_single_file_goes_before_the_index(tmp_path: Path) -> None:
    """As in transformers; an index may be left over from an older revision."""
    write_sharded(tmp_path, {"a": "gone.safetensors"}, model=VALID)
    assert set(open_safetensors(tmp_path)) == {"a", "b"}


def test_a_folder_in_place_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        open_safetensors(tmp_path)


# ------------------------------------------------------------------------------------------------------- what is random


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / SINGLE_FILE


def read_or_refuse(file: Path) -> None:
    """Anything but a CheckpointError fails the test, and so does a tensor that is not wholly inside the file."""
    tracemalloc.start()
    try:
        tensors = read_header(file)
        size = file.stat().st_size
        assert all(8 <= tensor.offset <= tensor.end <= size for tensor in tensors)
        assert all(one.end <= other.offset for one, other in itertools.pairwise(tensors))
    except CheckpointError as error:
        assert str(file) in str(error)  # noqa: PT017 - whether there is one depends on what was drawn
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=300))
def test_random_bytes(scratch: Path, raw: bytes) -> None:
    scratch.write_bytes(raw)
    read_or_refuse(scratch)


@settings(max_examples=150, deadline=None)
@given(text=st.binary(max_size=300))
def test_random_headers(scratch: Path, text: bytes) -> None:
    scratch.write_bytes(struct.pack("<Q", len(text)) + text)
    read_or_refuse(scratch)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["F32", "BF16", "U8"])
)
JSON = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(list(index_module.ITEM_BYTES)) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(-1, 64), st.integers(-1, 64)) | JSON,
    },
)


@settings(max_examples=200, deadline=None)
@given(header=st.dictionaries(st.text(max_size=8), ENTRIES | JSON, max_size=4), num_data_bytes=st.integers(0, 64))
def test_headers_of_random_json(scratch: Path, header: Header, num_data_bytes: int) -> None:
    write(scratch, header, num_data_bytes)
    read_or_refuse(scratch)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_files(scratch: Path, data: st.DataObject) -> None:
    raw = bytearray(raw_header(VALID) + bytes(32))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw)))
        cut = data.draw(st.integers(0, 4))
        raw[place : place + cut] = data.draw(st.binary(max_size=4))
    scratch.write_bytes(raw)
    read_or_refuse(scratch)


@pytest.mark.parametrize("contents", ["{}", '{"__metadata__": {"format": "pt"}}', "an index"])
def test_a_checkpoint_of_no_tensors_is_refused(tiny: WriteTiny, tmp_path: Path, contents: str) -> None:
    """What weights would be is imagined only where there are none."""
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama", torch.float32), folder)
    if contents == "an index":
        (folder / SINGLE_FILE).unlink()
        (folder / SHARD_INDEX).write_text('{"weight_map": {}}')
    else:
        (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", len(contents)) + contents.encode())
    for use in (AutoModel.from_pretrained, AutoModel.plan):
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(folder))}.* has no (weight_map of )?tensors"):
            use(folder, device="cpu")


@pytest.mark.parametrize("metadata", [["a"], "a", 1, {"weight": 1}, {"weight": None}, {"weight": {}}], ids=str)
def test_metadata_that_are_no_texts_are_refused_as_safetensors_does(file: Path, metadata: object) -> None:
    """Who needs them (torchao) would ask safetensors for them, which names no file."""
    refused(write(file, {"a": entry(), "__metadata__": metadata}, 8), "__metadata__.* text")
