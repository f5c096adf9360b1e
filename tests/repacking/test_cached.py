"""`compression=`: a checkpoint is packed once, into the cache folder, whoever asks first."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import airstream
from airstream import ArgumentError, AutoModel, BudgetError, CheckpointError, DiskSpaceError, UnsupportedError
from airstream.cli import main
from airstream.loading.prepare import prepare_for_planning
from airstream.repacking import cached
from airstream.repacking import repack as repack_module
from airstream.repacking.manifest import MANIFEST
from tests.compat.test_quantising import packages
from tests.conftest import Resident, WriteTiny, stream
from tests.stand_ins.comparing import BF16, FP32, assert_equal

PACKED = {"compression": "lossless"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder, empty."""
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    assert not list((tmp_path / "cache").glob("packed/.*-repacking")), "nothing is left half done"


def test_the_first_load_packs_and_the_second_does_not(
    tiny: WriteTiny, resident: Resident, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, reference = tiny("llama-tied", BF16), resident("llama-tied", BF16, BF16)
    with caplog.at_level(logging.WARNING), stream(folder, max_memory="100MiB", **PACKED) as model:
        assert_equal(model, reference)
        assert model.tokenizer is not None
    (made,) = (cache / "packed").glob("[!.]*-lossless-*")
    assert f"once, into {made}" in caplog.text
    monkeypatch.setattr(cached, "repack_and_report", lambda *_, **__: pytest.fail("it was packed again"))
    with stream(folder, max_memory="100MiB", **PACKED) as model:
        assert_equal(model, reference)
        assert Path(model.name_or_path) == made


def test_another_checkpoint_of_the_same_name_is_packed_anew(tiny: WriteTiny, cache: Path, tmp_path: Path) -> None:
    for name in ("llama", "llama-tied"):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny(name, BF16), folder)
        with stream(folder, max_memory="100MiB", **PACKED):
            pass
    assert len(list((cache / "packed").glob("model-lossless-*"))) == 2


def test_a_config_that_is_changed_counts(tiny: WriteTiny, cache: Path, tmp_path: Path) -> None:
    """Small files are copied, so that a copy with the old ones must not be taken."""
    folder = shutil.copytree(tiny("llama", BF16), tmp_path / ("long-name-" * 20))
    for eps in (1e-6, 0.1):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": eps}))
        with stream(folder, max_memory="100MiB", **PACKED) as model:
            assert model.config.rms_norm_eps == eps
            assert_equal(model, AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())


def test_a_cache_that_is_in_no_home(tiny: WriteTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRSTREAM_CACHE", "~nobody-is-called-so/cache")
    with pytest.raises(ArgumentError, match="AIRSTREAM_CACHE='~nobody-is-called-so/cache'"):
        AutoModel.from_pretrained(tiny("llama", BF16), device="cpu", **PACKED)


def test_two_processes_share_one(tiny: WriteTiny, cache: Path) -> None:
    code = (
        "import sys, airstream\n"
        "airstream.AutoModel.from_pretrained(sys.argv[1], device='cpu', compression='lossless').close()"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(tiny("llama", BF16))], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert sum("once, into" in each for each in said) == 1
    assert len(list((cache / "packed").glob("[!.]*-lossless-*"))) == 1


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda made: os.truncate(made / "model.safetensors", 100),
    "no weights": lambda made: (made / "model.safetensors").unlink(),
    "a header that is none": lambda made: overwrite(made / "model.safetensors", 5, b"\xff"),
    "a header of zeros": lambda made: overwrite(made / "model.safetensors", 0, bytes(4096)),
    "a byte of the header": lambda made: overwrite(made / "model.safetensors", 20, b"\xff"),
    "zeros for a config": lambda made: overwrite(made / "config.json", 0, bytes(100)),
    "another number in the config": lambda made: overwrite(
        made / "config.json", (made / "config.json").read_bytes().index(b'"hidden_size": ') + 15, b"9"
    ),
    "no config": lambda made: (made / "config.json").unlink(),
    "no manifest": lambda made: (made / MANIFEST).unlink(),
    "another manifest": lambda made: (made / MANIFEST).write_text("[]"),
    "a manifest of nothing": lambda made: (made / MANIFEST).write_text('{"format": 1, "files": {}}'),
    "a file": lambda made: (shutil.rmtree(made), made.write_text("x")),
    "nothing in it": lambda made: (shutil.rmtree(made), made.mkdir()),
    "a link that leads nowhere": lambda made: (shutil.rmtree(made), made.symlink_to("nowhere")),
}
"""What may become of a folder of the cache."""


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_in_the_cache_is_made_anew(tiny: WriteTiny, resident: Resident, cache: Path, name: str) -> None:
    folder = tiny("llama", BF16)
    with stream(folder, max_memory="100MiB", **PACKED):
        (made,) = (cache / "packed").glob("[!.]*-lossless-*")
    DAMAGES[name](made)
    with stream(folder, max_memory="100MiB", **PACKED) as model:
        assert_equal(model, resident("llama", BF16, BF16))


def test_a_cache_that_cannot_be_written(tiny: WriteTiny, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(DiskSpaceError, match=r"packed, where .* would be kept, cannot be written .*AIRSTREAM_CACHE"):
        AutoModel.from_pretrained(tiny("llama", BF16), device="cpu", **PACKED)


@pytest.mark.parametrize("what", ["a link", "no folder", "a folder that no repack has begun"])
def test_what_is_in_the_way_in_the_cache(tiny: WriteTiny, cache: Path, tmp_path: Path, what: str) -> None:
    """It is not touched, and whoever named no folder is not told to name another one."""
    folder, precious = tiny("llama", BF16), tmp_path / "precious"
    precious.mkdir()
    (precious / "letter.txt").write_text("kept")
    AutoModel.from_pretrained(folder, device="cpu", **PACKED).close()
    (made,) = (cache / "packed").glob("[!.]*-lossless-*")
    shutil.rmtree(made)
    work = made.with_name(f".{made.name}-repacking")
    if what == "a link":
        work.symlink_to(precious)
    elif what == "no folder":
        work.write_text("kept")
    else:
        shutil.copytree(precious, work)
    with pytest.raises(DiskSpaceError, match=rf"-repacking, .* is {what}: remove it, or set AIRSTREAM_CACHE"):
        AutoModel.from_pretrained(folder, device="cpu", **PACKED)
    assert [file.name for file in precious.iterdir()] == ["letter.txt"]
    assert work.is_file() or (work / "letter.txt").is_file()
    if work.is_dir() and not work.is_symlink():
        shutil.rmtree(work)
    else:
        work.unlink()
    AutoModel.from_pretrained(folder, device="cpu", **PACKED).close()


@pytest.mark.parametrize("compression", ["zip", "12bit", True, 4])
def test_what_is_no_codec(tiny: WriteTiny, cache: Path, compression: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^compression=.* is not a codec: .*[Tt]here is 'lossless'"):
        AutoModel.from_pretrained(tiny("llama", BF16), compression=compression)
    assert not cache.exists()


def test_gguf_is_packed_already(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match="is packed already, as GGUF"):
        AutoModel.from_pretrained(file, device="cpu", compression="lossless")


@pytest.mark.parametrize("source", ["nf4", "lossless"])
def test_what_is_quantised_or_packed_already_is_refused_before_packing_is_told(
    tiny: WriteTiny, cache: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if source == "nf4":
        packages("nf4")
    made = airstream.repack(tiny("llama", BF16), tmp_path / "out", codec=source, progress=False)
    capsys.readouterr()
    with pytest.raises(UnsupportedError, match=r"already.*, so compression='fp8' cannot be made of it"):
        AutoModel.from_pretrained(made, device="cpu", compression="fp8")
    assert main(["generate", str(made), "w5", "--device", "cpu", "--compression", "fp8"]) == 1
    err = capsys.readouterr().err
    assert "so --compression fp8 cannot be made of it" in err
    assert "packing" not in err
    assert "--codec" not in err


def test_it_is_planned_without_being_made(tiny: WriteTiny, cache: Path, tmp_path: Path) -> None:
    folder = tiny("llama", BF16)
    made = airstream.repack(folder, tmp_path / "out", codec="lossless", progress=False)
    facts = [
        prepare_for_planning(name, {"device": "cpu", **options}).facts
        for name, options in ((folder, PACKED), (made, {}))
    ]
    planned, real = (each.stored_bytes for each in facts)
    assert planned is not None
    assert real is not None
    assert real <= 1.02 * planned < 0.95 * facts[0].arithmetic.weight_bytes
    assert "decoding" in str(AutoModel.plan(folder, device="cpu", **PACKED))
    assert not cache.exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # what transformers and the formats' packages warn of is theirs
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("asked", [{"compression": "4bit"}, {"load_in_8bit": True}], ids=str)
def test_what_quantises_is_what_transformers_loads(tiny: WriteTiny, cache: Path, asked: dict[str, Any]) -> None:
    codec = "nf4" if "compression" in asked else "int8"
    packages(codec)
    with AutoModel.from_pretrained(tiny("llama", BF16), device="cpu", max_memory="400MiB", **asked) as model:
        (made,) = (cache / "packed").glob(f"[!.]*-{codec}-*")
        reference = AutoModelForCausalLM.from_pretrained(made, dtype="auto").eval()
        assert_equal(model, reference)


def test_what_cannot_be_packed_or_is_packed_is_not_copied(
    tiny: WriteTiny, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed = airstream.repack(tiny("llama", BF16), tmp_path / "out", codec="lossless", progress=False)
    for folder in (tiny("llama", FP32), packed):
        with stream(folder, max_memory="100MiB", **PACKED) as model:
            assert Path(model.name_or_path) == folder
    assert caplog.text.count("it is streamed as it is") == 2
    assert not cache.exists()


def test_float32_is_planned_as_it_is(tiny: WriteTiny) -> None:
    folder = tiny("llama", FP32)
    plans = [AutoModel.plan(folder, device="cpu", **options) for options in ({}, {"compression": "lossless"})]
    assert plans[0].batches == plans[1].batches


def test_the_command_line(tiny: WriteTiny, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", str(tiny("llama", BF16)), "w5 w6", "--max-new-tokens", "3", "--device", "cpu"]
    assert main(asked) == 0
    plain = capsys.readouterr().out
    assert main([*asked, "--compression", "lossless"]) == 0
    assert capsys.readouterr().out == plain
    assert len(list((cache / "packed").glob("[!.]*-lossless-*"))) == 1


def test_a_budget_that_is_too_small_is_refused_before_anything_is_packed(
    tiny: WriteTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(cached, "repack_and_report", lambda *_, **__: pytest.fail("it was packed"))
    with pytest.raises(BudgetError, match=r"does not fit"):
        AutoModel.from_pretrained(tiny("llama", BF16), device="cpu", compression="int8", max_memory="20MiB")


@pytest.mark.parametrize(
    ("moment", "name"),
    [
        ((cached, "_make"), "model.safetensors"),  # after it got its name
        ((repack_module, "begin_folder"), "model.safetensors"),
        ((repack_module, "_facts"), "config.json"),
    ],
)
def test_a_checkpoint_that_changes_while_it_is_packed_is_taken_for_neither(
    tiny: WriteTiny,
    resident: Resident,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: tuple[Any, str],
    name: str,
) -> None:
    """Else the copy would be called by what the checkpoint was, have what it is now, and be found when that is back."""
    folder = shutil.copytree(tiny("llama", BF16), tmp_path / "model")
    file, old = folder / name, shutil.copy2(folder / name, tmp_path / "old")

    do = getattr(*moment)

    def changed(*arguments: Any) -> Any:
        contents = file.read_bytes()
        file.write_bytes(contents + b"\n" if name == "config.json" else contents[:-2] + bytes(2))
        return do(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(*moment, changed)
        with pytest.raises(CheckpointError, match=rf"was changed while it was written anew \({name}\): do so again"):
            AutoModel.from_pretrained(folder, device="cpu", **PACKED)
    assert not list((cache / "packed").glob("[!.]*"))
    shutil.copy2(old, file)
    with stream(folder, max_memory="100MiB", **PACKED) as model:
        assert_equal(model, resident("llama", BF16, BF16))
