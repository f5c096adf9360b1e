"""Files that users name: written whole, through links, and never in the place of what is no file."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from airstream.errors import ArgumentError, DiskSpaceError
from airstream.reporting.outputs import check_output, written

NOTHING, FULL = 0x103, 0x107
"""The numbers of /dev/null and /dev/full, of which the tests make their own: none may touch those of the machine."""


def write(file: Path, text: str = "new") -> None:
    with written(file) as out:
        out.write(text.encode())


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def device(file: Path, number: int) -> Path:
    try:
        os.mknod(file, stat.S_IFCHR | 0o600, number)
        file.open("wb").close()
    except OSError as error:
        pytest.skip(f"no device can be made here: {error.strerror}")
    return file


def test_a_link_stays_one(tmp_path: Path) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir()
    (there / "file").write_text("old")
    for target in ("there/file", "there/new"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        write(link)
        assert link.is_symlink()
        assert (tmp_path / target).read_text() == "new"
    assert names_in(there) == ["file", "new"]
    assert names_in(tmp_path) == ["link", "there"]


def bind(file: Path) -> None:
    here = Path.cwd()
    os.chdir(file.parent)  # a socket's name has a hundred letters at most
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(file.name)
    finally:
        os.chdir(here)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "it is a pipe"),
    "a link to a pipe": (lambda file: (os.mkfifo(file.with_name("pipe")), file.symlink_to("pipe")), "it is a pipe"),
    "a socket": (bind, "it is a socket"),
    "a folder": (Path.mkdir, "it is a folder"),
    "a circle": (lambda file: file.symlink_to(file.name), "it is a link that leads in a circle"),
    "nowhere": (lambda file: file.symlink_to("not/there"), "there is no folder .*not"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("refuse", [check_output, write])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str, refuse: Callable[[Path], None]) -> None:
    make, said = REFUSED[name]
    make(tmp_path / "run.json")
    before = {path.name: path.lstat() for path in tmp_path.iterdir()}
    with pytest.raises(ArgumentError, match=f"{re.escape(str(tmp_path / 'run.json'))} cannot be written: {said}"):
        refuse(tmp_path / "run.json")
    assert {path.name: path.lstat() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ArgumentError, match=r"in no folder: '.*file' is a file"):
        check_output(tmp_path / "file" / "x" / "run.json")


def test_a_device_stays_one(tmp_path: Path) -> None:
    nothing, full = device(tmp_path / "null", NOTHING), device(tmp_path / "full", FULL)
    (tmp_path / "link").symlink_to("null")
    for file in (nothing, tmp_path / "link"):
        check_output(file)
        write(file)
    with pytest.raises(DiskSpaceError, match="No space left"):
        write(full)
    assert stat.S_ISCHR(nothing.lstat().st_mode)
    assert stat.S_ISCHR(full.lstat().st_mode)
    assert names_in(tmp_path) == ["full", "link", "null"]


@pytest.mark.skipif(not Path("/proc/self/fd/1").exists(), reason="no names for descriptors")
@pytest.mark.parametrize("to_file", [True, False])
def test_standard_output_goes_on(tmp_path: Path, to_file: bool) -> None:
    """It is named by a link of our own, in a folder of our own: who replaces it replaces that."""
    link = tmp_path / "link"
    link.symlink_to("/proc/self/fd/1")
    code = (
        "import sys; from pathlib import Path; from airstream.reporting.outputs import written\n"
        "print('before')\n"
        "with written(Path(sys.argv[1])) as out: out.write(b'inside\\n')\n"
        "print('after')"
    )
    with (tmp_path / "out").open("w+b") as out:
        run = subprocess.run([sys.executable, "-c", code, link], stdout=out if to_file else subprocess.PIPE, check=True)
        out.seek(0)
        said = out.read() if to_file else run.stdout
    assert said.split() == [b"before", b"inside", b"after"]
    assert link.is_symlink()


@pytest.mark.skipif(not Path("/proc/self/fd/1").exists(), reason="no names for descriptors")
def test_a_pipe_without_a_name(tmp_path: Path) -> None:
    """A shell's `>(gzip)`."""
    reading, writing = os.pipe()
    write(Path(f"/proc/self/fd/{writing}"))
    os.close(writing)
    with os.fdopen(reading) as out:
        assert out.read() == "new"


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 255)
    file.write_text("old")
    with pytest.raises(TypeError), written(file) as out:
        out.writelines([b"new", None])  # type: ignore[list-item]
    assert file.read_text() == "old"
    write(file)
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]
