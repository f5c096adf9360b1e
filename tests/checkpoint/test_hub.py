"""From a name to a folder: local ones in place, the hub's with no more than is needed, quick answers without either."""

from __future__ import annotations

import errno
import fnmatch
import importlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import airstream
from airstream import AutoModel
from airstream.checkpoint import hub, hub_errors
from airstream.checkpoint.hub import HubOptions, resolve
from airstream.checkpoint.locate import locate
from airstream.errors import (
    AirstreamError,
    ArgumentError,
    CheckpointError,
    CheckpointNotFoundError,
    DiskSpaceError,
    UnsupportedError,
)

Download = Callable[..., str]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked of the hub."""

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)


# ----------------------------------------------------------------------------------------------------- local folders


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("as_type", [str, Path])
def test_a_folder_is_used_in_place(tmp_path: Path, as_type: Callable[[Path], Any]) -> None:
    before = sorted(tmp_path.iterdir())
    assert resolve(as_type(tmp_path)) == tmp_path
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("no_hub")
def test_a_relative_folder_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("models/tiny").samefile(tmp_path / "models" / "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve("~/models/tiny") == tmp_path / "models" / "tiny"


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nothing", "../nothing", "~/no such folder", "a/b/c", Path("/no/such")]
)
def test_a_path_that_is_missing_is_not_looked_for_on_the_hub(name: Any) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no folder") as caught:
        resolve(name)
    assert str(name) in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.usefixtures("no_hub")
def test_no_name_at_all_is_an_argument_error() -> None:
    with pytest.raises(ArgumentError, match="name is empty: name a folder or a hub id"):
        resolve("")


ADDRESSES = {
    "https://huggingface.co/org/name": '"org/name"',
    "http://huggingface.co/org/name/": '"org/name"',
    "huggingface.co/org/name": '"org/name"',
    "hf://org/name": "the repository alone",
    "https://huggingface.co/org/name/tree/v2": '"org/name", revision="v2"',
    "https://huggingface.co/org/name/blob/main/config.json": '"org/name", revision="main"',
    "https://huggingface.co": "the repository alone",
}


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(("address", "meant"), ADDRESSES.items())
def test_an_address_is_told_its_name(address: str, meant: str) -> None:
    for use in (resolve, AutoModel.from_pretrained, AutoModel.plan):
        with pytest.raises(ArgumentError, match=rf"is an address: name {re.escape(meant)}"):
            use(address)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", [None, 5, b"name", ["a"]], ids=repr)
def test_what_is_no_name_is_an_argument_error(name: Any, tmp_path: Path) -> None:
    for use in (resolve, AutoModel.from_pretrained, AutoModel.plan, lambda name: airstream.repack(name, tmp_path)):
        with pytest.raises(ArgumentError, match=re.escape(f"the model's name is {name!r}: name a folder")):
            use(name)


def test_the_class_is_not_called() -> None:
    with pytest.raises(UnsupportedError, match=r"use AutoModel\.from_pretrained"):
        AutoModel("tiny")


@pytest.mark.usefixtures("no_hub")
def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UnsupportedError, match="is a file: name the folder") as caught:
        resolve(file)
    assert str(file) in str(caught.value)
    (tmp_path / "config.json").write_text("{}")
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(UnsupportedError) as caught:
            resolve(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name} is a file of a checkpoint: name its folder, {str(tmp_path)!r}"


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["model.safetensors", "model", "model.GGUF"])
def test_a_gguf_file_by_another_name_is_to_be_renamed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "config.json").write_text("{}")
    for use in (resolve, AutoModel.plan, airstream.verify):
        with pytest.raises(UnsupportedError, match=r"is a GGUF file: rename it to end in \.gguf"):
            use(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ the hub


class FakeHub:
    """Gives out the files of one repository that match what is asked for, and notes what that was."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder = folder
        self.files = files
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, "allow_patterns": allow_patterns, **options})
        for name, text in self.files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.folder / name).parent.mkdir(exist_ok=True)
                (self.folder / name).write_text(text)
        return str(self.folder)

    @property
    def given_out(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


SHARDS = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors", "c": "model-1-of-2.safetensors"}
SMALL = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "chat_template.jinja": "",
    "tokenizer.model": "",
    "merges.txt": "",
}
NOT_NEEDED = {
    "pytorch_model.bin": "",
    "consolidated.safetensors": "",
    "model.onnx": "",
    "modeling_own.py": "",
    "README.md": "",
    "model-fp8.safetensors": "",
}


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], FakeHub]:
    def make(files: dict[str, str]) -> FakeHub:
        fake = FakeHub(tmp_path, files)
        monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
        return fake

    return make


def test_only_the_shards_of_the_index_are_downloaded(fake_hub: Callable[..., FakeHub]) -> None:
    index = {"model.safetensors.index.json": json.dumps({"weight_map": SHARDS})}
    fake = fake_hub(SMALL | index | dict.fromkeys(SHARDS.values(), "") | NOT_NEEDED)
    assert resolve("some/model") == fake.folder
    assert fake.given_out == {*SMALL, *index, *SHARDS.values()}


VARIANTS: list[dict[str, str]] = [
    {"model.fp16.safetensors": ""},
    {
        "model.safetensors.index.fp16.json": json.dumps({"weight_map": {"a": "model.fp16-1.safetensors"}}),
        "model.fp16-1.safetensors": "",
    },
    {"pytorch_model.fp16.bin": ""},
    {
        "pytorch_model.bin.index.fp16.json": json.dumps({"weight_map": {"a": "pytorch_model.fp16-1.bin"}}),
        "pytorch_model.fp16-1.bin": "",
    },
]


@pytest.mark.parametrize("files", VARIANTS, ids=lambda files: next(iter(files)))
def test_of_a_variant_only_its_own_files_are_downloaded(
    files: dict[str, str], fake_hub: Callable[..., FakeHub]
) -> None:
    fake = fake_hub(SMALL | {"model.safetensors": "", "pytorch_model.bin": ""} | files)
    resolve("some/model", HubOptions(variant="fp16"))
    assert fake.given_out == {*SMALL, *files}


def test_of_a_subfolder_nothing_else_is_downloaded(fake_hub: Callable[..., FakeHub]) -> None:
    inside = {f"part/{name}": text for name, text in (SMALL | {"model.safetensors": ""}).items()}
    fake = fake_hub(SMALL | {"model.safetensors": ""} | inside)
    assert resolve("some/model", HubOptions(subfolder="part")) == fake.folder / "part"
    assert {str(path.relative_to(fake.folder)) for path in fake.folder.rglob("*") if path.is_file()} == {*inside}
    with pytest.raises(CheckpointNotFoundError, match="'some/model' has no folder 'other', which subfolder= names"):
        resolve("some/model", HubOptions(subfolder="other"))


def test_without_an_index_the_single_file_is_downloaded(fake_hub: Callable[..., FakeHub]) -> None:
    fake = fake_hub(SMALL | {"model.safetensors": ""} | NOT_NEEDED)
    resolve("some/model")
    assert fake.given_out == {*SMALL, "model.safetensors"}


def test_of_gguf_only_the_file_that_is_named_is_downloaded(fake_hub: Callable[..., FakeHub]) -> None:
    parts = [f"a-{number:05}-of-00002.gguf" for number in (1, 2)]
    fake = fake_hub(SMALL | dict.fromkeys((*parts, "b.gguf", "model.safetensors"), ""))
    place = locate("some/model", gguf_file=parts[1], with_weights=False)
    assert place == (fake.folder, fake.folder / parts[1])
    assert fake.given_out == {*SMALL, *parts}
    with pytest.raises(CheckpointNotFoundError, match=r"has no file 'c\.gguf'; there are a-00001"):
        locate("some/model", gguf_file="c.gguf")


def test_pickles_are_downloaded_only_where_there_is_nothing_else(fake_hub: Callable[..., FakeHub]) -> None:
    others = {"optimizer.bin": "", "pytorch_model.fp16.bin": "", "model.onnx": ""}
    fake = fake_hub(SMALL | {"pytorch_model.bin": ""} | others)
    resolve("some/model")
    assert fake.given_out == {*SMALL, "pytorch_model.bin"}


def test_the_shards_of_a_pickled_checkpoint(fake_hub: Callable[..., FakeHub]) -> None:
    shards = {name: shard.replace("safetensors", "bin") for name, shard in SHARDS.items()}
    index = {"pytorch_model.bin.index.json": json.dumps({"weight_map": shards})}
    fake = fake_hub(SMALL | index | dict.fromkeys(shards.values(), "") | {"pytorch_model.bin": ""})
    resolve("some/model")
    assert fake.given_out == {*SMALL, *index, *shards.values()}


def test_safetensors_go_before_the_index_of_pickles(fake_hub: Callable[..., FakeHub]) -> None:
    index = {"pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}})}
    fake = fake_hub(SMALL | index | {"pytorch_model-1.bin": "", "model.safetensors": ""})
    resolve("some/model")
    assert fake.given_out == {*SMALL, *index, "model.safetensors"}


def test_pickles_of_another_name_come_last(fake_hub: Callable[..., FakeHub]) -> None:
    fake = fake_hub(SMALL | {"consolidated.00.pth": ""})
    resolve("some/model")
    assert fake.given_out == {*SMALL, "consolidated.00.pth"}


def test_a_plan_needs_no_weights(fake_hub: Callable[..., FakeHub]) -> None:
    fake = fake_hub(SMALL | {"model.safetensors": ""})
    resolve("some/model", with_weights=False)
    assert fake.given_out == set(SMALL)


def test_code_comes_only_if_it_is_asked_for(fake_hub: Callable[..., FakeHub]) -> None:
    fake = fake_hub(SMALL | {"modeling_own.py": ""})
    resolve("some/model", with_code=True)
    assert "modeling_own.py" in fake.given_out


def test_options_reach_the_hub(fake_hub: Callable[..., FakeHub], tmp_path: Path) -> None:
    fake = fake_hub(SMALL)
    resolve("some/model", HubOptions("v2", "hf_secret", tmp_path / "cache", local_files_only=True))
    assert fake.calls
    for call in fake.calls:
        expected = {"repo_id": "some/model", "revision": "v2", "token": "hf_secret", "local_files_only": True}
        assert call | expected == call
        assert call["cache_dir"] == tmp_path / "cache"


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 5}', "{}", "[" * 99_999])
def test_an_index_that_is_none_is_reported(fake_hub: Callable[..., FakeHub], text: str, name: str) -> None:
    fake_hub(SMALL | {name: text})
    with pytest.raises(CheckpointError, match=r"index\.json is not a shard index"):
        resolve("some/model")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_nothing_outside_is_asked_for(fake_hub: Callable[..., FakeHub], name: str) -> None:
    fake = fake_hub(SMALL | {name: json.dumps({"weight_map": {"a": "../../x.bin"}})})
    with pytest.raises(CheckpointError, match="must lie beside the index"):
        resolve("some/model")
    assert not any("../" in pattern for call in fake.calls for pattern in call["allow_patterns"])


# ------------------------------------------------------------------------------------------------- the hub says no

httpx = importlib.import_module(huggingface_hub.errors.Response.__module__.partition(".")[0])
"""What huggingface_hub talks to servers with."""

Answer = Callable[[Callable[[Any], Any]], None]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answer]:
    """`server(answer)`: the real huggingface_hub, whose requests `answer` answers, or fails to."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_errors, "get_token", lambda: None)

    def start(answer: Callable[[Any], Any]) -> None:
        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answer)))

    yield start
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def status(number: int, **headers: str) -> Callable[[Any], Any]:
    """An answer of this status, with huggingface's headers."""
    named = {f"X-Error-{name.title()}": value for name, value in headers.items()}
    return lambda request: httpx.Response(number, headers=named, request=request)


def breaks(error: Exception) -> Callable[[Any], Any]:
    def answer(_: Any) -> Any:
        raise error

    return answer


TOKEN = {"token": "hf_x"}
REFUSALS: list[tuple[str, Callable[[Any], Any], dict[str, Any], str]] = [
    (
        "gated",
        status(401, code="GatedRepo"),
        {},
        r"is gated: accept its terms at \S+/some/model .*token=.*hf auth login",
    ),
    ("gated, with token", status(403, code="GatedRepo"), TOKEN, "/some/model with the account of your token, and wait"),
    (
        "not found",
        status(404, code="RepoNotFound"),
        {},
        r"no 'some/model' \(revision main\).*Check the name.*hf auth login",
    ),
    ("not shown", status(401), TOKEN, "Check the name; .* private, the account of your token needs access"),
    (
        "no revision",
        status(404, code="RevisionNotFound"),
        {"revision": "v9"},
        "has no revision 'v9'.*lists its branches",
    ),
    (
        "bad token",
        status(401, message="Invalid credentials in Authorization header"),
        TOKEN,
        "not accept the token: make",
    ),
    ("weak token", status(403, message="no"), TOKEN, "token may not read 'some/model'"),
    ("too many", status(429), {}, "too many requests from here: wait, or pass token="),
    ("down", status(503), {}, r"the hub is down or busy \(.*503.*\)\. Try again later"),
    ("broken", status(500), {}, r"the hub is down or busy \(.*500.*\)\. Try again later"),
    ("dns", breaks(httpx.ConnectError("[Errno -2] Name or service not known")), {}, "cannot be found: .* DNS"),
    (
        "dns, macOS",
        breaks(httpx.ConnectError("[Errno 8] nodename nor servname provided")),
        {},
        "cannot be found: .* DNS",
    ),
    ("dns, Windows", breaks(httpx.ConnectError("[Errno 11001] getaddrinfo failed")), {}, "cannot be found: .* DNS"),
    ("refused", breaks(httpx.ConnectError("[Errno 111] Connection refused")), {}, "refused: look at HF_ENDPOINT"),
    ("timeout", breaks(httpx.ConnectTimeout("timed out")), {}, r"does not answer in time .* Try again"),
    ("proxy", breaks(httpx.ProxyError("407 Unauthorized")), {}, "proxy refuses: look at HTTPS_PROXY"),
    ("certificate", breaks(httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]")), {}, "SSL_CERT_FILE"),
    (
        "reset",
        breaks(httpx.ReadError("reset by peer")),
        {},
        r"cannot be reached \(reset by peer\)\. Try again later",
    ),
    ("told not to ask", status(200), {"local_files_only": True}, "neither .*offline: local_files_only.*Connect once"),
]


@pytest.mark.parametrize(
    ("answer", "options", "said"), [each[1:] for each in REFUSALS], ids=[each[0] for each in REFUSALS]
)
def test_the_hub_says_no_and_the_message_says_why(
    answer: Callable[[Any], Any], options: dict[str, Any], said: str, server: Answer, tmp_path: Path
) -> None:
    server(answer)
    with pytest.raises(CheckpointNotFoundError, match=said) as caught:
        resolve("some/model", HubOptions(cache_dir=tmp_path, **options))
    assert "'some/model'" in str(caught.value) or "token" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_what_was_begun_resumes(server: Answer, tmp_path: Path) -> None:
    blobs = tmp_path / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123.incomplete").touch()
    server(breaks(httpx.ReadError("reset by peer")))
    with pytest.raises(CheckpointNotFoundError, match="Try again: it resumes"):
        resolve("some/model", HubOptions(cache_dir=tmp_path))


def test_told_to_stay_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointNotFoundError, match=r"'some/model' is neither .*HF_HUB_OFFLINE.* name a local folder"
    ):
        resolve("some/model", HubOptions(cache_dir=tmp_path))


def test_a_full_disk_is_no_fault_of_the_hub(server: Answer, tmp_path: Path) -> None:
    server(breaks(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DiskSpaceError, match=r"No space left on device\. Make room, .* cache_dir"):
        resolve("some/model", HubOptions(cache_dir=tmp_path))


@pytest.mark.parametrize(
    "error", [ConnectionError("reset by peer"), TimeoutError("timed out"), OSError(5, "I/O error")]
)
def test_a_download_that_breaks_off(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointNotFoundError, match=r"downloading 'some/model' failed: .*Try again") as caught:
        resolve("some/model")
    assert error.args[-1] in str(caught.value)


def test_offline_the_answer_is_quick_and_has_a_remedy(tmp_path: Path) -> None:
    """The real huggingface_hub: local_files_only asks no server."""
    started = time.monotonic()
    with pytest.raises(CheckpointNotFoundError, match=r"'some/model'.*Connect once.* local folder"):
        resolve("some/model", HubOptions(cache_dir=tmp_path, local_files_only=True))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("name", ["gpt 2", "a/b!", "name--with--dashes", "-x", "a" * 200])
def test_a_name_that_no_repository_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(AirstreamError) as caught:
        resolve(name, HubOptions(cache_dir=tmp_path, local_files_only=True))
    assert isinstance(caught.value, CheckpointNotFoundError)
    assert repr(name) in str(caught.value)
