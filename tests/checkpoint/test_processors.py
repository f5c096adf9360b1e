"""Files of processors and chat templates made to do harm: refused by the file's name, at once, and in little memory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPImageProcessor, LlavaProcessor, WhisperFeatureExtractor

from airstream import AirstreamError, CheckpointError
from airstream.auto import Beside, load_beside
from airstream.checkpoint.beside import MAX_TEMPLATE_BYTES, SETTINGS
from airstream.compat import suspects
from tests.checkpoint.test_hostile import peak_bytes
from tests.stand_ins.limits import GENEROUS, MAX_BYTES, MAX_SECONDS
from tests.stand_ins.tiny_models import tiny_tokenizer

PROCESSOR, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
OLD_TEMPLATE, TEMPLATE = "chat_template.json", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates/x.jinja"
JSON_FILES = (PROCESSOR, IMAGES, VIDEOS, OLD_TEMPLATE)
FILES = (*JSON_FILES, TEMPLATE)
DEEP = '{"a":' * 600 + "1" + "}" * 600


def llava(folder: Path) -> None:
    """A processor of images, every part of it in a file of its own, as older versions wrote them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w5"]})
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(images, tokenizer, patch_size=4, image_token="w5").save_pretrained(folder)
    values = json.loads((folder / PROCESSOR).read_text())
    (folder / IMAGES).write_text(json.dumps(values.pop("image_processor") | {"processor_class": "LlavaProcessor"}))
    (folder / PROCESSOR).write_text(json.dumps(values))
    (folder / "config.json").write_text('{"model_type": "llava"}')


def whisper(folder: Path) -> None:
    """A processor of sound."""
    tiny_tokenizer().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    values = json.loads((folder / IMAGES).read_text())
    (folder / IMAGES).write_text(json.dumps(values | {"processor_class": "WhisperProcessor"}))
    (folder / "config.json").write_text('{"model_type": "whisper"}')


KINDS: dict[str, Callable[[Path], None]] = {"llava": llava, "whisper": whisper}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    KINDS[request.param](tmp_path)
    return tmp_path


def sparse(path: Path, nbytes: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(nbytes)


HARMFUL: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "20 GB": lambda path: sparse(path, 20 << 30),
    "a pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
}
HARMFUL_JSON: dict[str, Callable[[Path], Any]] = {
    "deep": lambda path: path.write_text(DEEP),
    "deep lists": lambda path: path.write_text("[" * 600 + "]" * 600),
    "64 MB of lists": lambda path: path.write_text('{"a": [' + "[]," * (20 << 20) + "[]]}"),
    "digits": lambda path: path.write_text('{"a": ' + "1" * 5_000 + "}"),
    "a list": lambda path: path.write_text("[1]"),
    "null": lambda path: path.write_text("null"),
    "nothing": lambda path: path.write_text(""),
    "a page": lambda path: path.write_text("<!doctype html><html>"),
    "half a letter": lambda path: path.write_text(r'{"chat_template": "\ud800"}'),
}


@pytest.mark.parametrize("what", ["tokenizer", "processor"])
@pytest.mark.parametrize(
    ("name", "harm"),
    [(name, harm) for name in FILES for harm in HARMFUL]
    + [(name, harm) for name in JSON_FILES for harm in HARMFUL_JSON]
    + [(MORE_TEMPLATES, harm) for harm in HARMFUL],
)
def test_files_that_are_broken(folder: Path, name: str, harm: str, what: Beside) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    (HARMFUL | HARMFUL_JSON)[harm](path)
    before, started = peak_bytes(), time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        load_beside(folder, False, what)
    assert str(path) in str(caught.value)
    assert time.thread_time() - started < MAX_SECONDS * GENEROUS
    assert peak_bytes() - before < MAX_BYTES


def test_a_template_of_megabytes_is_none(tmp_path: Path) -> None:
    whisper(tmp_path)
    (tmp_path / TEMPLATE).write_text(" " * MAX_TEMPLATE_BYTES)
    assert load_beside(tmp_path, False, "tokenizer").chat_template
    (tmp_path / TEMPLATE).write_text(" " * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(CheckpointError, match=rf"{TEMPLATE} has 1,048,577 bytes: it is nothing of a tokenizer"):
        load_beside(tmp_path, False, "tokenizer")


NAMED: list[tuple[str, str, Any]] = [
    *((PROCESSOR, field, 7) for field in ("image_processor", "feature_extractor", "video_processor")),
    *((OLD_TEMPLATE, "chat_template", value) for value in (7, [], {}, None)),
    (OLD_TEMPLATE, "chat_template", ...),
]


@pytest.mark.parametrize(("name", "field", "value"), NAMED, ids=str)
def test_the_field_that_is_wrong_is_named(folder: Path, name: str, field: str, value: Any) -> None:
    old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(old | ({} if value is ... else {field: value})))
    with pytest.raises(CheckpointError, match=rf"{name}.*{field}"):
        load_beside(folder, False, "processor")


VALUES = [-1, 10**30, 1.5, "x", [[]], {"1": [1]}, None]
FIELDS = ["processor_class", "auto_map", "image_processor_type", "feature_extractor_type", "size", "self", "cls"]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("field", FIELDS)
def test_absurd_values_are_one_error_or_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, field: str
) -> None:
    """All that transformers raises is of our classes, and nothing takes long."""
    monkeypatch.setattr(suspects, "MAX_SECONDS", 0.02)  # which field it was is not asked here
    old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    for value in VALUES:
        (folder / name).write_text(json.dumps(old | {field: value}))
        before, started = peak_bytes(), time.thread_time()
        try:
            load_beside(folder, False, "processor")
        except AirstreamError as error:
            assert str(folder) in str(error)  # noqa: PT017 - what transformers minds is its own affair
        assert time.thread_time() - started < MAX_SECONDS * GENEROUS
        assert peak_bytes() - before < MAX_BYTES


def test_what_is_no_larger_than_it_may_be_is_read(tmp_path: Path) -> None:
    whisper(tmp_path)
    values = json.loads((tmp_path / IMAGES).read_text())
    (tmp_path / IMAGES).write_text(json.dumps(values | {"a": "x" * (SETTINGS.max_bytes // 2)}))
    assert load_beside(tmp_path, False, "processor").feature_extractor.feature_size == 8
