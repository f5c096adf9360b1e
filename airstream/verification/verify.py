"""`airstream.verify` says whether a checkpoint is complete and uncorrupted. It composes the modules beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from airstream.checkpoint.beside import check_small_files, has_tokenizer
from airstream.checkpoint.locate import locate
from airstream.checkpoint.stored import CheckpointIndex
from airstream.errors import AirstreamError, CheckpointError, UnsupportedError
from airstream.layout.byte_plan import read_specs
from airstream.loading.arguments import refuse_others
from airstream.loading.build import build_model
from airstream.loading.options import SOURCE_OPTIONS, LoadOptions, check_flag
from airstream.repacking.manifest import read_manifest
from airstream.reporting.status import status
from airstream.system.cache import sizes_vouched_for
from airstream.verification.checksums import Checksum, known_checksums, wrong_sizes
from airstream.verification.contents import Contents, read_contents, read_gguf_contents
from airstream.verification.reading import check_file
from airstream.verification.report import VerifyReport

NUM_READERS = 4
"""Files that are read at once: one thread hashes about as fast as one disk reads."""


def verify(
    model: str | os.PathLike[str], *, deep: bool = False, read: bool = True, progress: bool = True, **options: Any
) -> VerifyReport:
    """Look at all of checkpoint `model` and say everything that is wrong with it.

    Headers against their files; every tensor that the model of config.json needs, with its shape; checksums, where
    there is something to compare with: the manifest of `airstream.repack`, the names that the hub's cache gives its
    files, the blocks of weights that are packed without loss. All weights are read once, at the speed of the disk, so
    that what the disk cannot give back is found too.

    Args:
        model: a folder, a hub id or a GGUF file.
        deep: look for NaN and infinite values too.
        read: False leaves out everything that reads weights.
        progress: show a bar on standard error, if that is a terminal.
        options: gguf_file, subfolder, variant, revision, token, cache_dir, local_files_only, trust_remote_code as in
            `AutoModel.from_pretrained`.

    Raises:
        CheckpointNotFoundError: there is no such folder or repository.
    """
    started = time.monotonic()
    for name, value in (("deep", deep), ("read", read), ("progress", progress)):
        check_flag(name, value)
    refuse_others(options, SOURCE_OPTIONS)
    known = LoadOptions(device="cpu", **options)
    folder, gguf = locate(model, known.hub, known.gguf_file, known.trust_remote_code)
    with status(f"reading the headers of {(gguf or folder).name}", progress):
        index, contents = read_gguf_contents(gguf) if gguf else _read_folder(folder, known.variant)
    faults, notes = list(contents.faults), list[str]()
    manifest: Mapping[str, Any] | None = None
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        faults.append(str(error))
    try:
        check_small_files(folder)
    except CheckpointError as error:
        faults.append(str(error))
    layers = (manifest or {}).get("layers")
    if index is not None:  # a GGUF file that cannot be read does not say what model it holds
        unfit, unchecked = _compare_with_model(folder, known, contents, index, is_part=layers is not None)
        faults += unfit
        notes += unchecked
    if layers is not None:
        notes.append(f"it has layers {layers[0]} to {layers[1] - 1} only: other tensors are not expected")
    checksums = known_checksums(folder, manifest)
    if not any(file in checksums for file in contents.files):
        sizes = sizes_vouched_for(folder)
        faults += wrong_sizes(folder, sizes)
        but_sizes = ", but their sizes, which airstream's manifest has" if sizes else ""
        notes.append(f"no checksums of its weights are known{but_sizes}")
    wrong, read_bytes = _read_files(contents, checksums, deep, progress) if read else ([], 0)
    return VerifyReport(
        folder,
        tuple(dict.fromkeys(faults + wrong)),  # what two looks find is told once
        tuple(notes),
        num_files=len(contents.files),
        num_tensors=len(contents.tensors),
        checked_files=len(checksums) if read else 0,
        read_bytes=read_bytes,
        values_scanned=read and deep,
        seconds=time.monotonic() - started,
        gguf=gguf,
    )


def _read_folder(folder: Path, variant: str | None) -> tuple[CheckpointIndex, Contents]:
    contents = read_contents(folder, variant)
    return CheckpointIndex(contents.tensors), contents


def _compare_with_model(
    folder: Path, options: LoadOptions, contents: Contents, index: CheckpointIndex, is_part: bool
) -> tuple[list[str], list[str]]:
    """What the model needs and the tensors do not give, and what could not be found out or is odd."""
    try:
        built = build_model(folder, options, torch.device("cpu"), index)
    except UnsupportedError as error:
        return [], [f"tensors are not compared with a model: {error}"]
    except AirstreamError as error:
        return [str(error)], []
    faults: list[CheckpointError] = []
    may_lack = is_part or not contents.is_whole
    try:
        read_specs(built.model, index, built.dtype, built.quantizer, faults=faults, may_lack=may_lack)
    except CheckpointError as error:
        faults.append(error)
    notes = [] if contents.is_whole else ["files are missing or corrupt: the tensors in them are not named one by one"]
    if not has_tokenizer(folder) and built.model.main_input_name == "input_ids":
        notes.append("it has no tokenizer: copy tokenizer.json and tokenizer_config.json into it to use it with text")
    return [str(fault) for fault in faults], notes


def _read_files(
    contents: Contents, checksums: Mapping[Path, Checksum], deep: bool, progress: bool
) -> tuple[list[str], int]:
    """What is wrong with the bytes, and how many of them have been read."""
    from tqdm import tqdm

    files = sorted({*contents.files, *checksums})
    tensors = {file: [t for t in contents.tensors.values() if t.file == file] for file in files}
    total = sum(_size(file) for file in files)
    off = None if progress else True
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=off) as bar,
        ThreadPoolExecutor(NUM_READERS, "airstream-verify") as pool,
    ):
        read: list[int] = []

        def on_bytes(count: int) -> None:
            read.append(count)
            bar.update(count)

        def check(file: Path) -> Sequence[str]:
            return check_file(file, checksums.get(file), tensors[file], deep, on_bytes)

        return [fault for faults in pool.map(check, files) for fault in faults], sum(read)


def _size(file: Path) -> int:
    """Bytes of `file`, 0 if the system does not say: the reason is found when it is read."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
