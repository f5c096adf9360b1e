"""`airstream cache`: what is listed, what is cleared, and above all what is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from airstream import AutoModel
from airstream.cli import main
from airstream.repacking.manifest import JOURNAL, MANIFEST
from tests.conftest import WriteTiny
from tests.stand_ins.comparing import BF16

Out = pytest.CaptureFixture[str]
PACKED = {"compression": "lossless", "device": "cpu", "max_memory": "200MiB"}


@pytest.fixture(scope="module")
def sources(tiny: WriteTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `one` and `two`, and with a cache in which both are packed, one after the other."""
    root = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRSTREAM_CACHE", str(root / "cache"))
        for name in ("one", "two"):
            AutoModel.from_pretrained(shutil.copytree(tiny("llama", BF16), root / name), **PACKED).close()
            time.sleep(0.02)
    return root


@pytest.fixture
def packed(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed copies in a cache of the test's own, which has those of `sources`."""
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "cache"))
    shutil.copytree(sources / "cache", tmp_path / "cache")
    return tmp_path / "cache" / "packed"


def copy_of(packed: Path, model: str) -> Path:
    (folder,) = packed.glob(f"{model}-lossless-*")
    return folder


def listed(capsys: Out) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main(["cache", "--json"]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def test_copies_are_listed_with_what_people_ask_for(packed: Path, capsys: Out) -> None:
    assert main(["cache"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["SIZE", "CODEC", "LAST", "USE", "MODEL", "NAME"]
    assert [line.split()[-2:] for line in out.splitlines()[1:]] == [
        [model, copy_of(packed, model).name] for model in ("two", "one")
    ]
    assert "2 packed checkpoints, " in err
    assert str(packed) in err
    first, second = listed(capsys)
    assert [first["model"], second["model"]] == ["two", "one"]
    assert {each["codec"] for each in (first, second)} == {"lossless"}
    assert first["nbytes"] == sum(file.stat().st_size for file in copy_of(packed, "two").iterdir())
    assert first["state"] == "whole"


def test_the_last_use_is_that_of_a_model(packed: Path, sources: Path, capsys: Out) -> None:
    before = time.time()
    for source in (sources / "one", copy_of(packed, "one")):  # however it is named
        time.sleep(0.02)
        options = PACKED if source == sources / "one" else {"device": "cpu", "max_memory": "200MiB"}
        AutoModel.from_pretrained(source, **options).close()
        newest = listed(capsys)[0]
        assert newest["model"] == "one"
        assert isinstance(newest["last_use"], float)
        assert newest["last_use"] > before
        before = newest["last_use"]


@pytest.mark.parametrize("by", ["model", "name"])
def test_one_is_cleared_and_the_other_stays(packed: Path, sources: Path, by: str, capsys: Out) -> None:
    gone, kept = copy_of(packed, "one"), copy_of(packed, "two")
    assert main(["cache", "--clear", "one" if by == "model" else gone.name]) == 0
    out, err = capsys.readouterr()
    assert out == f"{gone.name}\n"
    assert "1 packed checkpoint removed, " in err
    assert not gone.exists()
    assert (kept / MANIFEST).is_file()
    AutoModel.from_pretrained(sources / "one", **PACKED).close()  # made anew
    assert gone.is_dir()
    assert main(["cache", "--clear"]) == 0
    assert listed(capsys) == []
    assert main(["cache"]) == 0
    assert "0 packed checkpoints, 0 B" in capsys.readouterr().err


def test_a_name_that_is_not_there(packed: Path, capsys: Out) -> None:
    assert main(["cache", "--clear", "Two"]) == 1
    assert "did you mean 'two'?" in capsys.readouterr().err
    assert main(["cache", "--clear", "one", "elsewhere/three"]) == 1
    assert "is called 'elsewhere/three': there are " in capsys.readouterr().err
    assert len(listed(capsys)) == 2  # all or nothing


def test_a_copy_that_a_model_uses_stays(packed: Path, sources: Path, capsys: Out) -> None:
    with AutoModel.from_pretrained(sources / "one", **PACKED):
        assert {each["model"]: each["state"] for each in listed(capsys)} == {"one": "in use", "two": "whole"}
        assert main(["cache", "--clear"]) == 1
        assert f"{copy_of(packed, 'one').name} is in use, and stays" in capsys.readouterr().err
        assert not list(packed.glob("two-*"))
    assert main(["cache", "--clear"]) == 0
    assert not list(packed.glob("one-*"))


def test_a_copy_that_another_process_uses_stays(packed: Path, sources: Path) -> None:
    code = (
        "import sys\nfrom airstream import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], device='cpu', compression='lossless', max_memory='200MiB')\n"
        "print('ready', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(sources / "one")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert main(["cache", "--clear", "one"]) == 1
        child.kill()
    assert main(["cache", "--clear", "one"]) == 0
    assert not list(packed.glob("one-*"))


def test_one_that_is_being_made_stays_and_one_that_was_killed_goes(packed: Path, capsys: Out) -> None:
    name = copy_of(packed, "one").name
    work = packed / f".{name}-repacking"
    copy_of(packed, "one").rename(work)
    (work / MANIFEST).rename(work / JOURNAL)
    assert {each["model"]: each["state"] for each in listed(capsys)} == {"one": "unfinished", "two": "whole"}
    with FileLock(packed / f".{name}.lock"):
        assert {each["model"]: each["state"] for each in listed(capsys)} == {"one": "in use", "two": "whole"}
        assert main(["cache", "--clear", "one"]) == 1
        assert (work / "model.safetensors").is_file()
    assert main(["cache", "--clear", "one"]) == 0
    assert not work.exists()


FOREIGN: dict[str, Callable[[Path, Path], object]] = {
    "a link to a copy": lambda packed, elsewhere: (packed / "x-lossless-0123456789ab").symlink_to(elsewhere),
    "a folder of another name": lambda packed, elsewhere: shutil.copytree(elsewhere, packed / "letters"),
    "a folder without manifest": lambda packed, _: (packed / "x-lossless-0123456789ab").mkdir(),
    "a folder that no repack began": lambda packed, elsewhere: shutil.copytree(
        elsewhere, packed / ".x-lossless-0123456789ab-repacking", ignore=shutil.ignore_patterns(MANIFEST)
    ),
    "a file": lambda packed, _: (packed / "x-lossless-0123456789ab").write_text("kept"),
}
"""What may lie in the folder of the copies and is none."""


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_copy_is_never_removed(packed: Path, tmp_path: Path, what: str, capsys: Out) -> None:
    elsewhere = shutil.copytree(copy_of(packed, "two"), tmp_path / "elsewhere")
    assert main(["cache", "--clear"]) == 0
    FOREIGN[what](packed, elsewhere)
    (packed.parent / "hardware.json").write_text("{}")
    before = sorted(packed.parent.rglob("*")), sorted(elsewhere.iterdir())
    assert listed(capsys) == []
    assert main(["cache", "--clear"]) == 0
    assert (sorted(packed.parent.rglob("*")), sorted(elsewhere.iterdir())) == before


def test_files_that_others_put_into_a_copy_stay(packed: Path, capsys: Out) -> None:
    one = copy_of(packed, "one")
    (one / "notes.txt").write_text("mine")
    (one / "folder").mkdir()
    os.truncate(one / "model.safetensors", 10)
    assert {each["model"]: each["state"] for each in listed(capsys)} == {"one": "damaged", "two": "whole"}
    assert main(["cache", "--clear"]) == 0
    assert "has files that are not of the copy: they stay" in capsys.readouterr().err
    assert sorted(each.name for each in one.iterdir()) == ["folder", "notes.txt"]


def test_listing_writes_nothing(packed: Path, capsys: Out) -> None:
    for file in packed.glob(".*"):
        file.unlink()
    before = sorted(packed.rglob("*"))
    (newest, _) = listed(capsys)
    assert sorted(packed.rglob("*")) == before
    assert newest["last_use"] == copy_of(packed, str(newest["model"])).stat().st_mtime


def test_it_is_told_without_torch(packed: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom airstream.cli import main\nsys.exit(main(['cache', '--clear']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_no_cache_is_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "nothing"))
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["cache", "--clear"]) == 0
    assert not (tmp_path / "nothing").exists()
    assert main(["cache", "--clear", "x"]) == 1
    assert main(["cache", "--json", "--clear"]) == 1
