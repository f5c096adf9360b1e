"""Files that others wrote: what is sound is read as Python would, and what would cost too much never gets that far."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from airstream import ArgumentError, AutoModel, CheckpointError, CheckpointNotFoundError, verify
from airstream.auto import load_beside
from airstream.checkpoint.formats import has_weights, open_checkpoint
from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.names import PICKLE_FILE, SHARD_INDEX, SINGLE_FILE
from airstream.checkpoint.safetensors import MAX_HEADER_BYTES, open_safetensors, read_header
from airstream.system import foreign_json
from airstream.system.foreign_files import open_regular
from airstream.system.foreign_json import (
    CONFIG,
    HEADER,
    INDEX,
    MAX_DEPTH,
    MAX_DIGITS,
    VALUE_BYTES,
    check_json,
    parse_json,
    read_json,
)
from tests.conftest import WriteTiny
from tests.stand_ins.limits import limited

ROOM = HEADER.parsed_bytes


def read(file: Path) -> Any:
    """What airstream reads of `file`, by its name."""
    if file.name == "config.json":
        return read_json(file, CONFIG)
    return GgufIndex.open(file) if file.suffix == ".gguf" else open_checkpoint(file.parent)


# ---------------------------------------------------------------------------------------------------- what may be read

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(value=JSON_VALUES, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 2]))
def test_what_is_sound_is_read_as_python_does(value: Any, ensure_ascii: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return  # half of a surrogate pair
    if r"\ud" in text.lower():
        return  # these have tests of their own
    assert parse_json(raw, CONFIG) == json.loads(text)


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 1 << 18])
@pytest.mark.parametrize(
    "value",
    ['"', "\\", '\\"', '\\\\"[[', "[" * 99, "9" * 200, {"\\": ["]", '"[']}, [[["\\\\", '"'], "{"], "\\" * 5]],
    ids=repr,
)
def test_brackets_digits_and_quotes_within_strings_do_not_count(
    value: Any, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a string is cut for being measured."""
    monkeypatch.setattr(foreign_json, "_CHUNK_BYTES", chunk_bytes)
    assert parse_json(json.dumps(value).encode(), CONFIG) == value


@pytest.mark.parametrize("chunk_bytes", [1, 5, 1 << 18])
def test_limits_are_exact_wherever_the_text_is_cut(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_json, "_CHUNK_BYTES", chunk_bytes)
    check_json(b'["\\"",' + b"[" * (MAX_DEPTH - 1) + b"]" * MAX_DEPTH, CONFIG)
    with pytest.raises(ValueError, match="deep"):
        check_json(b'["\\"",' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, CONFIG)
    check_json(b'["a",' + b"7" * MAX_DIGITS + b', "b"]', CONFIG)
    with pytest.raises(ValueError, match="digits"):
        check_json(b'["a",' + b"7" * (MAX_DIGITS + 1) + b', "b"]', CONFIG)


@pytest.mark.parametrize(
    "text", [r'"\ud83d\ude00"', r'"\\ud800"', r'"\\\\ud800"', r'"\uD83D\uDE00\u00e9"', '"\\ue000"']
)
def test_pairs_of_surrogates_are_letters(text: str) -> None:
    assert parse_json(text.encode(), CONFIG) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        r'"\ud800"',
        r'"\udc00"',
        r'"\ud83d\ud83d\ude00"',
        r'"\ud83d\ude00\ude00"',
        r'"\\\ud800"',
        r'"\ud83d\\\ude00"',
        r'"\uD800x"',
    ],
)
def test_halves_of_pairs_are_refused(text: str) -> None:
    assert any("\ud800" <= letter < "\ue000" for letter in json.loads(text)), "else there would be nothing to refuse"
    with pytest.raises(ValueError, match="surrogate"):
        parse_json(text.encode(), CONFIG)


def test_the_largest_checkpoints_fit() -> None:
    """210,000 tensors in an index, and 45,000 in one header, as the largest models that are published have."""
    names = [f"model.layers.{i // 3456}.mlp.experts.{i % 384}.down_proj.weight_packed.{i}" for i in range(210_000)]
    index = {"weight_map": {name: f"model-{i % 62:05}-of-000062.safetensors" for i, name in enumerate(names)}}
    check_json(json.dumps(index, indent=2).encode(), INDEX)
    end = 10**12
    header = {name: {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [end, end]} for name in names[:45_000]}
    raw = json.dumps(header).encode()
    with limited():
        assert len(parse_json(raw, HEADER, unique=True)) == 45_000


# ------------------------------------------------------------------------------------------------ what costs too much

HOSTILE: dict[str, Callable[[], bytes]] = {
    "one size of 400 digits": lambda: b'{"a":{"dtype":"U8","shape":[1' + b"0" * 400 + b'],"data_offsets":[0,1]}}',
    "sizes of 4,000 digits": lambda: b'{"a":{"shape":[' + b",".join([b"9" * 4000] * 1000) + b"]}}",
    "a size of a megabyte of digits": lambda: b'{"a":' + b"9" * (1 << 20) + b"}",
    "as long numbers as there may be": lambda: _filled(b"9" * MAX_DIGITS + b",", 1),
    "sizes as long as they may be": lambda: (
        b'{"a":{"dtype":"U8","shape":[' + b",".join([b"9" * 99] * 60) + b'],"data_offsets":[0,1]}}'
    ),
    "thousands of sizes": lambda: b'{"a":{"dtype":"U8","shape":[' + b"1," * 99_999 + b'1],"data_offsets":[0,1]}}',
    "lists": lambda: b"[" + b"[]," * (10 << 20) + b"[]]",
    "as many lists as there may be": lambda: _filled(b"[],", 2),
    "as many objects as there may be": lambda: _filled(b'{"a":1},', 2),
    "as many letters as there may be": lambda: _filled('"\u20ac",'.encode(), 1, copies=9),
    "as many escaped letters as there may be": lambda: _filled(rb'"\u20ac",', 1),
    "floats": lambda: _filled(b"1e9,", 1),
    "one name": lambda: b'{"' + b"a" * (ROOM // 3 - 99) + b'":1}',
    "one type": lambda: b'{"a":{"dtype":"' + b"F" * (ROOM // 3 - 99) + b'","shape":[1],"data_offsets":[0,1]}}',
    "one wide name": lambda: b'{"\xf0\x9f\x98\x80' + b"a" * (ROOM // 9 - 99) + b'":1}',
    "backslashes": lambda: b'{"' + b"\\" * (ROOM // 3 - 99) + b'":1}',
    "quotes": lambda: b"{" + b'"' * (ROOM // 3 - 99) + b"}",
    "surrogates": lambda: b'{"' + rb"\ud83d\ude00" * (ROOM // 36 - 99) + b'":1}',
    "surrogates, and a half": lambda: b'{"' + rb"\ud83d\ude00" * (ROOM // 36 - 99) + rb'\ude00":1}',
    "depth": lambda: b"[" * (ROOM // 3 - 99),
    "depth in objects": lambda: b'{"a":' * (ROOM // 18),
    "spaces": lambda: b" " * (ROOM // 3 - 99),
    "a byte order mark": lambda: b"\xef\xbb\xbf{}",
    "UTF-16": lambda: '{"a":1}'.encode("utf-16"),
    "half of a pair, raw": lambda: b'{"\xed\xa0\x80":1}',
    "half of a pair": lambda: rb'{"\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "infinite": lambda: b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,NaN]}}',
}


def _filled(value: bytes, num_values: int, copies: int = 3) -> bytes:
    """A list of as many `value` as just pass for a header."""
    count = (ROOM - 1000) // (num_values * VALUE_BYTES + copies * len(value))
    return b"[" + value * count + b"0]"


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    text = HOSTILE[case]()
    file = tmp_path / SINGLE_FILE
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"0")
    del text
    with limited(), pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_indexes(tmp_path: Path, case: str) -> None:
    (tmp_path / SHARD_INDEX).write_bytes(HOSTILE[case]())
    with limited(), pytest.raises(CheckpointError) as caught:
        open_safetensors(tmp_path)
    assert SHARD_INDEX in str(caught.value)
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize("name", [SHARD_INDEX, "config.json", SINGLE_FILE, PICKLE_FILE, "m.gguf"])
@pytest.mark.parametrize("size", [1 << 30, 20 << 30])
def test_files_of_nothing_but_size(tmp_path: Path, name: str, size: int) -> None:
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(size)  # sparse
    with limited(8 << 20), pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read(tmp_path / name)


SHARDS = ["x" * 300, "\u00e9" * 200, "x" * 100_000, "a/b", "\n" * 300, "x\0"]


@pytest.mark.parametrize("shard", SHARDS, ids=lambda name: repr(name[:9]))
@pytest.mark.parametrize("use", [has_weights, open_checkpoint])
def test_shards_that_no_file_system_has(tmp_path: Path, shard: str, use: Callable[[Path], Any]) -> None:
    (tmp_path / SHARD_INDEX).write_text(json.dumps({"weight_map": {"the.tensor": shard}}))
    with pytest.raises(CheckpointError, match=r"index\.json places 'the\.tensor'") as caught:
        use(tmp_path)
    assert len(str(caught.value)) < 1000


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mutated_indexes(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Bytes of a sound index and header, changed, repeated, cut and moved: read, or refused by name."""
    chance = random.Random(seed)
    folder = tmp_path_factory.mktemp("mutated")
    index = json.dumps({"weight_map": {f"layer.{i}\u00e9": f"x{i % 3}.safetensors" for i in range(9)}}).encode()
    (folder / SHARD_INDEX).write_bytes(mutated(index, chance))
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)  # noqa: PT017 - whether there is one depends on what was drawn


def mutated(raw: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(raw) + 1)
        end = min(len(raw), start + chance.randint(0, 12))
        piece = chance.choice(
            [b"", b'"', b"[", b"{", b"}", b"\\", b"9" * 50, rb"\ud800", b"\xff", b"null", raw[start:end] * 9]
        )
        raw = raw[:start] + piece + raw[end:]
    return raw


# -------------------------------------------------------------------------------------------- what is not even a file


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


NO_FILES = [a_pipe, a_socket, a_loop, a_device, a_terminal, Path.mkdir]


@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__name__)
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        open_regular(path)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["m.gguf", "model.bin", "model.pth", SINGLE_FILE, SHARD_INDEX, "config.json"])
def test_no_file_of_a_checkpoint_is_waited_for(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    with pytest.raises(CheckpointError):
        AutoModel.from_pretrained(tmp_path, device="cpu")


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("gone")


@pytest.mark.parametrize("make", [*NO_FILES, a_link_to_nothing], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json", "x.jinja"])
def test_no_small_file_is_passed_over(tiny: WriteTiny, tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    """Where transformers would do without what it says."""
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama", torch.float32), folder)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    if name == "x.jinja" and make is Path.mkdir:  # a folder of templates, as some repositories have
        return
    load = partial(load_beside, folder, False, "tokenizer")
    if name == "generation_config.json":
        load = partial(AutoModel.from_pretrained, folder, device="cpu", max_memory="1GiB", max_context=32)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load()
    assert any(name in fault for fault in verify(folder, progress=False).faults)


@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x/" * 5000, "~nobody_of_this_name/m"])
def test_models_of_names_that_no_system_has(name: str) -> None:
    for use in (lambda: AutoModel.from_pretrained(name, device="cpu"), lambda: verify(name, progress=False)):
        with pytest.raises(ArgumentError, match="cannot be the name"):
            use()


def test_a_folder_whose_name_is_not_text(tiny: WriteTiny, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    try:
        shutil.copytree(tiny("llama", torch.float32), folder)
    except OSError:
        pytest.skip("this file system has no such names")
    with AutoModel.from_pretrained(folder, device="cpu", max_memory="1GiB", max_context=32) as model:
        model(torch.tensor([[3, 4]]))
        with pytest.raises(CheckpointError, match="the folder's name"):
            _ = model.tokenizer


def test_names_that_no_system_has(tmp_path: Path) -> None:
    for name in ("x" * 5000, "x\0y", "\ud800"):
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            open_regular(tmp_path / name)
        str(caught.value).encode()
    with pytest.raises(CheckpointNotFoundError, match="is missing"):
        open_regular(tmp_path / "gone")


# ------------------------------------------------------------------------------------------------- what it really is


def _zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("model.safetensors", b"x" * 99)


def _torch_old(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


CONTENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "git-lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"),
        "a pointer that git-lfs left in place of the file. Fetch the file: git lfs install && git lfs pull",
    ),
    "empty": (lambda path: path.write_bytes(b""), "empty: .*Download it again"),
    "html": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"), "a web page"),
    "html, short": (lambda path: path.write_text("<HTML>404"), "a web page"),
    "xml": (lambda path: path.write_text('<?xml version="1.0"?><Error>AccessDenied</Error>'), "in XML"),
    "json": (lambda path: path.write_text('{"error":"Invalid username or password."}'), "in JSON"),
    "text": (lambda path: path.write_text("Entry not found"), "text, not what its name says"),
    "zeros": (lambda path: path.write_bytes(bytes(10_000)), "begins with zeros"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 99)), "unpack it with gunzip"),
    "zip": (_zipped, "unpack it with unzip"),
    "tar": (lambda path: path.write_bytes(b"a".ljust(257, b"\0") + b"ustar\0" + bytes(400)), "unpack it with tar"),
    "zstd": (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99)), "unpack it with unzstd"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "safetensors": (lambda path: save_file({"a": torch.zeros(2)}, path), r"rename it to end in \.safetensors"),
    "torch": (lambda path: torch.save({"a": torch.zeros(2)}, path), r"rename it to pytorch_model\.bin"),
    "torch, old": (_torch_old, r"rename it to pytorch_model\.bin"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(99)), r"rename it to end in \.gguf"),
}
OWN = {SINGLE_FILE: ("safetensors",), PICKLE_FILE: ("torch", "torch, old"), "m.gguf": ("gguf",)}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("contents", CONTENTS)
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path: Path, name: str, contents: str) -> None:
    write, said = CONTENTS[contents]
    path = tmp_path / name
    write(path)
    if contents in OWN[name]:
        return
    with pytest.raises(CheckpointError, match=rf"{path} is .*{said}"):
        read(path)


@pytest.mark.parametrize("contents", ["git-lfs", "empty", "html", "xml", "text", "zeros", "gzip"])
@pytest.mark.parametrize("name", [SHARD_INDEX, "config.json"])
def test_small_files_too(tmp_path: Path, name: str, contents: str) -> None:
    write, said = CONTENTS[contents]
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} is .*{said}"):
        read_json(tmp_path / name, INDEX)


def test_a_header_that_is_only_large(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_FILE
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b'{"a":')
        stream.truncate(2 * MAX_HEADER_BYTES)
    with limited(1 << 20), pytest.raises(CheckpointError, match="save it in several files"):
        read_header(file)
