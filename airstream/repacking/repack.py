"""`airstream.repack` writes a checkpoint anew so that each layer is one run of bytes, or just some of its layers.

The result takes its name when it is complete; before that it lies in a hidden folder beside it, from which a run that
was killed goes on. The original is only read.

It knows folders and what a killed run has left. It refuses to know the order of tensors (`plan`), and how a file is
written (`write`).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from airstream.checkpoint.hub import check_name
from airstream.checkpoint.names import MANIFEST, SHARD_INDEX
from airstream.codecs.names import LOSSLESS_CODEC, codec_named
from airstream.compat.asked_formats import AskedFormat
from airstream.errors import AirstreamError, ArgumentError
from airstream.layout.packable import may_pack
from airstream.layout.shards import SHARD_SIZE, Shard
from airstream.loading.arguments import refuse_others
from airstream.loading.asked import codec_name
from airstream.loading.options import SOURCE_OPTIONS, LoadOptions, check_flag
from airstream.loading.prepare import prepare
from airstream.repacking.files import check_storable, plan_files
from airstream.repacking.manifest import FORMAT, JOURNAL, digest_of, read_journal, write_json
from airstream.repacking.report import RepackReport
from airstream.repacking.source import Source, copied_files, state_of
from airstream.repacking.target import beside, check_target, is_done, target_of
from airstream.repacking.unfinished import begin_folder, what_is_in_the_way
from airstream.repacking.way import Way
from airstream.repacking.ways import way_of
from airstream.repacking.write import copy_small, sha256_of
from airstream.reporting.status import status
from airstream.reporting.units import parse_shard_size
from airstream.system.cache import sync
from airstream.system.disk_space import check_file_size, check_free_space, named_when_full

CONFIG = "config.json"

GOES_ON = "Free some and run the same again: it keeps what is finished and goes on from there"


def repack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: str | range | tuple[int, int] | None = None,
    shard_size: int | str = SHARD_SIZE,
    codec: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write the checkpoint `model` to the folder `out`, each layer as one run of bytes that begins on a page.

    The tensors keep their names and, but for `codec`, their bytes, and all small files are copied as they are, so that
    transformers loads the result like the original. `airstream-repack.json` in it says what it was made from and has
    the checksum of every file. A run that was killed goes on where it was. Blocks; its buffers are 16 MiB for any
    model, with `codec` as much for each of at most 8 threads.

    Args:
        model: a folder or hub id; safetensors or pickles. It is only read.
        out: a folder that does not exist or is empty. A complete repack of the same checkpoint is left as it is.
        layers: `"5:15"` writes layers 5 to 14 only, for a machine that runs only these. What comes before the layers
            (embeddings) goes with the first layer, what comes behind them (norm, lm_head) with the last.
        shard_size: what a file should not be larger than; a layer is never cut.
        codec: `"lossless"` packs weights in bfloat16 to three quarters of their bytes. Every bit of them comes back,
            but only airstream reads the result; without a codec, it is unpacked. The others quantise the weights inside
            the layers, and transformers loads the result, too: `"nf4"` (bitsandbytes), `"int8"` (torchao), `"fp8"`
            (e4m3 in blocks, as DeepSeek-V3), `"int4"` (compressed-tensors).
        progress: show a bar on standard error, if that is a terminal.
        options: subfolder, variant, revision, token, cache_dir, local_files_only, trust_remote_code as in
            `AutoModel.from_pretrained`.

    Raises:
        ArgumentError: `out` is in use for something else, or `layers` are not there, or there is no such `codec`.
        CheckpointError: the checkpoint is incomplete or corrupt.
        DiskSpaceError: the disk has not enough room; the message has the numbers. What is finished is kept.
        UnsupportedError: the checkpoint is a GGUF file, or cannot be quantised by `codec`; the message says why.
    """
    report = repack_and_report(
        model, out, layers=layers, shard_size=shard_size, codec=codec, progress=progress, **options
    )
    return report.folder


def repack_and_report(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: str | range | tuple[int, int] | None = None,
    shard_size: int | str = SHARD_SIZE,
    codec: str | AskedFormat | None = None,
    progress: bool = True,
    begins: Callable[[], None] = lambda: None,
    **options: Any,
) -> RepackReport:
    """As `repack`, which see; gives what was done, too. Calls `begins` once nothing is left to be refused."""
    started = time.monotonic()
    check_name(model)
    check_flag("progress", progress)
    refuse_others(options, SOURCE_OPTIONS)
    dtype: torch.dtype | None = None
    if isinstance(codec, AskedFormat):
        dtype = codec.dtype
    elif codec is not None:
        codec = codec_named(codec)
    target = target_of(out)
    shard_bytes = parse_shard_size(shard_size)
    with status(f"planning {Path(model).absolute().name}", progress, is_timed=False):  # the hub may draw bars
        prepared = prepare(model, LoadOptions(device="cpu", dtype=dtype or "auto", **options))
    check_target(target, prepared.folder)
    check_storable(prepared)
    way = way_of(codec, prepared)
    shards, chosen = plan_files(prepared, layers, shard_bytes, way)
    smaller = ", or name a smaller shard_size=... (a layer is never cut)"
    check_file_size(max(way.expected_bytes(shard) for shard in shards), "repacking", smaller)
    source = state_of(prepared.folder, prepared.index.files)
    facts = _facts(prepared.dtype, source, codec, shards, chosen)
    begins()
    kept = _write(target, source, shards, facts, way, progress)
    return RepackReport(
        target,
        num_files=len(shards),
        num_bytes=sum((target / shard.file).stat().st_size for shard in shards),
        kept_files=len(shards) if kept is None else kept,
        is_old=kept is None,
        seconds=time.monotonic() - started,
        packs_nothing=codec == LOSSLESS_CODEC and not any(may_pack(each) for shard in shards for each in shard.tensors),
    )


def _facts(
    dtype: torch.dtype,
    source: Source,
    codec: str | AskedFormat | None,
    shards: Sequence[Shard],
    chosen: tuple[int, int] | None,
) -> dict[str, Any]:
    """What tells the result from others; of which tensors lie in which file, only a digest."""
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "source": source.weights,
        "layers": None if chosen is None else list(chosen),
        "shards": {shard.file: [tensor.name for tensor in shard.tensors] for shard in shards},
    }
    if codec is not None:
        recipe["codec"] = codec_name(codec)
    if isinstance(codec, AskedFormat):
        recipe["settings"] = codec.settings | {"dtype": str(dtype)}
    return {"recipe": digest_of(recipe)} | {name: recipe[name] for name in recipe if name != "shards"}


def _write(
    target: Path, source: Source, shards: Sequence[Shard], facts: Mapping[str, Any], way: Way, progress: bool
) -> int | None:
    """Fill the folder beside `target` that takes its name when it is complete.

    Returns how many files of weights were kept from a run before; None if all is there and nothing was to be done.
    """
    work = beside(target)
    lock = work.with_name(f"{work.name}.lock")
    job = _Repack(work, source, shards, facts, way, progress)
    try:
        with named_when_full(work, job.missing_bytes, "repacking", GOES_ON):
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=0):
                try:
                    is_complete = is_done(target, facts)
                    if not is_complete:
                        job.fill()
                        _give_name(work, target)
                finally:
                    if not job.has_finished_any() and not what_is_in_the_way(work):  # there is nothing to go on from
                        shutil.rmtree(work, ignore_errors=True)
                    lock.unlink(missing_ok=True)
        return None if is_complete else job.num_kept
    except Timeout:
        if not lock.exists():  # some file systems refuse to make a file as if it were in use
            raise ArgumentError(
                f"{target} cannot be written (no file can be made there): name another folder"
            ) from None
        raise ArgumentError(f"another process is repacking into {target}") from None
    except AirstreamError:
        raise
    except OSError as error:
        raise ArgumentError(
            f"{target} cannot be written ({error.filename or work}: {error.strerror or error}): name another folder"
            f"{f', and remove {work}, which has what was finished' if job.has_finished_any() else ''}"
        ) from error


def _give_name(work: Path, target: Path) -> None:
    (work / JOURNAL).unlink()
    sync(work)
    if target.exists():
        target.rmdir()
    work.replace(target)
    sync(target.parent)


class _Repack:
    """One repack under way in the folder `work`."""

    def __init__(
        self, work: Path, source: Source, shards: Sequence[Shard], facts: Mapping[str, Any], way: Way, progress: bool
    ) -> None:
        self._work = work
        self._source = source
        self._shards = shards
        self._facts = dict(facts)
        self._way = way
        self._progress = progress
        self._done: dict[str, dict[str, Any]] = {}
        self.num_kept = 0

    def has_finished_any(self) -> bool:
        """Whether a file of weights is there, of this run or one before, so that another one can go on."""
        with suppress(OSError):  # it may be that no folder can be called so
            return any(self._work.glob("*.safetensors"))
        return False

    def missing_bytes(self) -> int:
        """What is still to be written."""
        missing = [shard for shard in self._shards if shard.file not in self._done]
        small = [file for file in copied_files(self._source.folder) if file.name not in self._done]
        return sum(map(self._way.expected_bytes, missing)) + sum(file.stat().st_size for file in small)

    def fill(self) -> None:
        """Write what is not there yet, the manifest last."""
        from tqdm import tqdm

        begin_folder(self._work)
        total = sum(shard.nbytes for shard in self._shards)
        off = None if self._progress else True
        with tqdm(total=total, unit="B", unit_scale=True, desc="repacking", disable=off) as bar:
            self._take_over(bar.update)
            check_free_space(self._work, self.missing_bytes(), f"repacking into {self._work.parent}", GOES_ON)
            for shard in self._shards:
                if shard.file not in self._done:
                    checksum = self._way.write(self._work / shard.file, shard, bar.update)
                    self._source.check_weights({tensor.file: None for tensor in shard.tensors})
                    self._note(shard.file, checksum)
        for file in copied_files(self._source.folder):
            if self._way.config is not None and file.name == CONFIG:
                write_json(self._work / CONFIG, self._way.config(file))
            else:
                copy_small(file, self._work / file.name)
            sync(self._work / file.name)
            self._note(file.name, sha256_of(self._work / file.name))
        self._source.check_small()
        if len(self._shards) > 1:
            write_json(self._work / SHARD_INDEX, self._index())
            self._note(SHARD_INDEX, sha256_of(self._work / SHARD_INDEX))
        write_json(self._work / MANIFEST, self._facts | {"files": dict(sorted(self._done.items()))})

    def _take_over(self, on_bytes: Any) -> None:
        """Keep what a run before has finished, if it made the same and its files have their checksums; else nothing."""
        journal = read_journal(self._work) or {}
        same = journal.get("recipe") == self._facts["recipe"]
        shards = {shard.file: shard for shard in self._shards} if same else {}
        for name, entry in journal.get("files", {}).items():
            file = self._work / name
            if name in shards and file.is_file() and sha256_of(file) == entry["sha256"]:
                self._done[name] = entry
                self.num_kept += 1
                on_bytes(shards[name].nbytes)
        for file in self._work.iterdir():
            if file.name not in self._done:
                file.unlink()
        self._save()

    def _note(self, name: str, checksum: str) -> None:
        self._done[name] = {"bytes": (self._work / name).stat().st_size, "sha256": checksum}
        self._save()

    def _save(self) -> None:
        write_json(self._work / JOURNAL, {"format": FORMAT, "recipe": self._facts["recipe"], "files": self._done})

    def _index(self) -> dict[str, Any]:
        places = {tensor.name: shard.file for shard in self._shards for tensor in shard.tensors}
        return {"metadata": {"total_size": sum(shard.nbytes for shard in self._shards)}, "weight_map": places}
