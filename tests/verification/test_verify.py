"""`verify`: what is sound is called sound, and every fault is found and named, however many there are."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import airstream
from airstream import CheckpointNotFoundError
from airstream.checkpoint.safetensors import read_header
from airstream.cli import main
from airstream.repacking.manifest import MANIFEST
from airstream.system.cache import MANIFEST as SIZES
from airstream.verification import reading
from tests.checkpoint.test_pickles import Save, save, transposed  # noqa: F401 - `save` is a fixture
from tests.conftest import WriteTiny
from tests.stand_ins.comparing import BF16, FP32
from tests.stand_ins.tiny_gguf import write_tiny_gguf

Copy = Callable[[str], Path]


@pytest.fixture
def copy(tiny: WriteTiny, tmp_path: Path) -> Copy:
    """`copy(name)`: a tiny checkpoint that may be broken."""
    return lambda name: shutil.copytree(tiny(name, BF16), tmp_path / "checkpoint")


def faults_of(folder: Path, **options: bool) -> tuple[str, ...]:
    return airstream.verify(folder, progress=False, **options).faults


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


# --------------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("name", ["llama-sharded", "llama-tied", "mixtral", "gpt2", "gpt_oss", "deepseek_v3"])
def test_what_is_sound(tiny: WriteTiny, name: str) -> None:
    folder = tiny(name, BF16)
    report = airstream.verify(folder, deep=True, progress=False)
    assert report.faults == ()
    assert report.is_sound
    assert report.num_files == len(shards_of(folder))
    assert report.num_tensors == sum(len(read_header(file)) for file in shards_of(folder))
    assert report.read_bytes == sum(file.stat().st_size for file in shards_of(folder))
    assert report.notes == ("no checksums of its weights are known",)
    assert f"{folder}: sound; {report.num_tensors} tensors" in str(report)
    assert json.loads(report.to_json())["is_sound"] is True


def test_pickles(save: Save, tmp_path: Path) -> None:  # noqa: F811
    folder = save("llama", FP32, transposed)
    report = airstream.verify(folder, deep=True, progress=False)
    assert (report.faults, report.num_files) == ((), 1)
    assert not (tmp_path / "cache").exists(), "nothing is rearranged to be looked at"
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    (fault,) = faults_of(folder)
    assert "not a complete archive" in fault


def test_quick_reads_no_weights(tiny: WriteTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WeightFile", None)
    report = airstream.verify(tiny("llama", BF16), read=False, progress=False)
    assert (report.is_sound, report.read_bytes, report.checked_files) == (True, 0, 0)


# -------------------------------------------------------------------------------------------------------------- faults


def test_several_faults_are_all_named(copy: Copy) -> None:
    folder = copy("llama-sharded")
    shards = shards_of(folder)
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    shards[1].unlink()
    shards[2].write_bytes(b"oops")
    rewrite(shards[3], lambda tensors: tensors.pop(next(iter(tensors))))
    faults = faults_of(folder)
    assert len(faults) == 4
    for shard, fault, said in zip(
        shards, faults, ["is truncated", "is missing", "is text", "is missing, though"], strict=False
    ):
        assert str(shard) in fault
        assert said in fault


def test_tensors_that_the_model_needs(copy: Copy) -> None:
    folder = copy("llama")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(64, 63)
        tensors["lm_head.weight"] = torch.zeros(127, 64)

    rewrite(folder / "model.safetensors", change)
    faults = faults_of(folder)
    assert len(faults) == 4
    assert any("'model.layers.1.mlp.up_proj.weight' [128, 64] is missing" in fault for fault in faults)
    assert any("'model.norm.weight' [64] is missing" in fault for fault in faults)
    assert any("q_proj.weight' has shape [64, 63]" in fault for fault in faults)
    assert any("'lm_head.weight' has shape [127, 64]" in fault for fault in faults)


def test_an_expert_that_is_missing(copy: Copy) -> None:
    folder = copy("mixtral")
    names = [name for name in load_file(folder / "model.safetensors") if "experts.2." in name and ".1." in name]
    rewrite(folder / "model.safetensors", lambda tensors: tensors.pop(names[0]))
    faults = faults_of(folder)
    assert faults
    assert all("layers.1" in fault for fault in faults)


def test_values_that_are_no_numbers(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 4096)
    folder = copy("llama")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan
        tensors["lm_head.weight"].view(-1)[::100] = -torch.inf

    rewrite(folder / "model.safetensors", change)
    assert faults_of(folder) == ()
    faults = faults_of(folder, deep=True)
    assert len(faults) == 2
    assert "'model.norm.weight' has 1 value that is NaN" in " ".join(faults)
    assert "'lm_head.weight' has 82 values" in " ".join(faults)


@pytest.mark.parametrize("place", range(6))
def test_elements_across_two_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """A header of any length may put an element across the end of what is read at once."""
    values = torch.zeros(3000)
    values[[0, 500, 1023, 1024, 2999]] = torch.nan
    raw = values.view(torch.uint8).numpy().tobytes()
    text = json.dumps({"w": {"dtype": "F32", "shape": [3000], "data_offsets": [0, len(raw)]}}) + " " * place
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + raw)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 4096)
    (fault,) = reading.check_file(file, None, read_header(file), True, lambda _: None)
    assert "'w' has 5 values" in fault


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64], ids=str)
def test_nan_of_every_type(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"w": torch.tensor([0.0, 1.0, torch.nan]).to(dtype), "i": torch.full((3,), -1)}, file)
    (fault,) = reading.check_file(file, None, read_header(file), True, lambda _: None)
    assert "'w' has 1 value that is" in fault


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no config.json"),
        ("[]", "not a JSON object"),
        ('{"model_type": "llama", "hidden_size": -1}', "hidden_size is -1"),
    ],
)
def test_a_config_that_is_none(copy: Copy, config: str | None, said: str) -> None:
    folder = copy("llama")
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    (fault,) = faults_of(folder)
    assert said in fault


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "preprocessor_config.json", "config.json"])
def test_small_files_that_cannot_be_used(copy: Copy, name: str) -> None:
    """A checkpoint without its tokenizer answers nothing, however sound its weights are."""
    folder = copy("llama")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    (fault,) = faults_of(folder)
    assert f"{name} is a pointer that git-lfs left in place of the file" in fault


def test_no_checkpoint_at_all(tiny: WriteTiny, tmp_path: Path) -> None:
    shutil.copy(tiny("llama", BF16) / "config.json", tmp_path)
    assert any("has no checkpoint" in fault for fault in faults_of(tmp_path))
    with pytest.raises(CheckpointNotFoundError):
        airstream.verify(tmp_path / "nowhere", progress=False)


# ----------------------------------------------------------------------------------------------------------- checksums


def flip(file: Path, place: int = -5) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)


def test_one_bit_of_a_repacked_checkpoint(tiny: WriteTiny, tmp_path: Path) -> None:
    out = airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)
    report = airstream.verify(out, progress=False)
    assert (report.faults, report.notes, report.checked_files) == ((), (), len(list(out.iterdir())) - 1)
    flip(shards_of(out)[2])
    (out / "generation_config.json").unlink()
    with (out / "tokenizer.json").open("a") as file:
        file.write(" ")
    faults = faults_of(out)
    assert len(faults) == 3
    assert "generation_config.json is missing" in faults[0]
    assert f"{shards_of(out)[2]} is corrupt" in faults[1]
    assert "tokenizer.json is corrupt" in faults[2]
    (out / MANIFEST).write_text("{")
    assert any(MANIFEST in fault for fault in faults_of(out))


def test_some_layers_only(tiny: WriteTiny, tmp_path: Path) -> None:
    out = airstream.repack(tiny("llama", BF16), tmp_path / "out", layers="1:3", progress=False)
    report = airstream.verify(out, progress=False)
    assert report.is_sound
    assert "layers 1 to 2 only" in report.notes[0]
    for shard in shards_of(out):
        shard.unlink()
    assert not airstream.verify(out, progress=False).is_sound


def test_the_names_that_the_hub_gives_files(tiny: WriteTiny, tmp_path: Path) -> None:
    """As in the hub's cache: a snapshot of links to files that are called by their checksums."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in tiny("llama", BF16).iterdir():
        data = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        name = hashlib.sha256(data).hexdigest() if file.suffix == ".safetensors" else git
        (blobs / name).write_bytes(data)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", name))
    report = airstream.verify(snapshot, progress=False)
    assert (report.faults, report.notes, report.checked_files) == ((), (), len(list(snapshot.iterdir())))
    flip(snapshot / "model.safetensors")
    flip(snapshot / "tokenizer.json")
    faults = faults_of(snapshot)
    assert [fault.partition(" is corrupt")[0] for fault in faults] == [
        str(snapshot / "model.safetensors"),
        str(snapshot / "tokenizer.json"),
    ]


def test_what_the_hub_notes_beside_files(copy: Copy) -> None:
    folder = copy("llama")
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (notes / "model.safetensors.metadata").write_text(f"abc\n{digest}\n1700000000.0\n")
    assert airstream.verify(folder, progress=False).checked_files == 1
    flip(folder / "model.safetensors")
    (fault,) = faults_of(folder)
    assert "according to the hub" in fault


# -------------------------------------------------------------------------------------------------------- command line


def test_the_exit_status(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("llama")
    assert main(["verify", str(folder), "--deep"]) == 0
    assert "every value looked at" in capsys.readouterr().out
    rewrite(folder / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    assert main(["verify", str(folder), "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "'model.norm.weight' [64] is missing" in lines[0]
    assert "1 fault;" in lines[-1]
    assert main(["verify", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"]
    assert main(["verify", str(folder / "nowhere")]) == 1


# ------------------------------------------------------------------------------------ where the checkpoint comes from


def test_a_missing_tokenizer_is_noted_and_is_no_fault(copy: Copy) -> None:
    folder = copy("llama")
    assert not any("tokenizer" in note for note in airstream.verify(folder, progress=False).notes)
    for file in folder.glob("token*"):
        file.unlink()
    report = airstream.verify(folder, progress=False)
    assert report.is_sound
    assert any("no tokenizer: copy tokenizer.json" in note for note in report.notes)


def test_a_variant_in_a_subfolder(copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("llama-sharded")
    for file in shards_of(folder):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace(".safetensors", ".fp16.safetensors")
    index.unlink()
    (folder / "model.safetensors.index.fp16.json").write_text(text)
    options = ["--subfolder", folder.name, "--variant", "fp16"]
    assert main(["verify", str(folder.parent), *options]) == 0
    assert "sound; 39 tensors" in capsys.readouterr().out
    assert main(["repack", str(folder.parent), str(tmp_path / "out"), *options]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0, "the result has files of the usual names"
    assert main(["verify", str(folder.parent), "--subfolder", folder.name, "--variant", "int8"]) == 1
    assert "no checkpoint of variant='int8'" in capsys.readouterr().out


def test_the_sizes_of_a_folder_of_the_cache_are_compared(tmp_path: Path) -> None:
    file = write_tiny_gguf("llama", tmp_path / "m.gguf", quant="Q4_0")
    nbytes = file.stat().st_size
    for sizes, fault in (
        ({"m.gguf": nbytes}, None),
        ({"m.gguf": nbytes + 1}, f"{file} has {nbytes:,} bytes, not {nbytes + 1:,}"),
        ({"m.gguf": nbytes, "other.json": 5}, f"{tmp_path / 'other.json'} is missing"),
    ):
        (tmp_path / SIZES).write_text(json.dumps({"files": sizes, "recipe": "r"}))
        report = airstream.verify(file, progress=False)
        assert report.faults == (() if fault is None else (fault,))
        assert "no checksums of its weights are known, but their sizes, which airstream's manifest has" in report.notes
        assert json.loads(report.to_json())["gguf"] == str(file)


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gguf").mkdir()
    file = write_tiny_gguf("llama", tmp_path / "gguf" / "m.gguf", quant="Q4_0")
    for words in ([str(file)], [str(file.parent)], [str(file.parent), "--gguf-file", file.name]):
        assert main(["verify", *words, "--deep"]) == 0
        out = capsys.readouterr().out
        assert re.search(rf"^{re.escape(str(file))}: sound; \d+ tensors in 1 file, ", out, re.MULTILINE)
        assert "note: no checksums of its weights are known\n" in out
    assert main(["repack", str(file), str(tmp_path / "out")]) == 1
    assert "is GGUF, which safetensors cannot hold" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["verify", str(file)]) == 1
    assert "m.gguf" in capsys.readouterr().out
