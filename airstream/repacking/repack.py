"""`airstream.repack` writes a checkpoint anew so that each layer is one run of bytes, or just some of its layers.

The result takes its name when it is complete; before that it lies in a hidden folder beside it, from which a run that
was killed goes on. The original is only read.

It knows folders and what a killed run has left. It refuses to know the order of tensors (`plan`), and how a file is
written (`write`).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.hub import check_name
from airstream.checkpoint.names import SHARD_INDEX
from airstream.checkpoint.stored import ITEM_BYTES, CheckpointIndex
from airstream.compat.weights import KeyConversion, MappedConversion, natural_order, tied_names
from airstream.errors import AirstreamError, ArgumentError, UnsupportedError
from airstream.layout.parts import find_units
from airstream.loading.arguments import refuse_others
from airstream.loading.options import SOURCE_OPTIONS, LoadOptions, check_flag
from airstream.loading.prepare import prepare
from airstream.loading.prepared import Prepared
from airstream.repacking.manifest import FORMAT, JOURNAL, MANIFEST, digest_of, fingerprint, read_journal, write_json
from airstream.repacking.plan import Member, Order, Shard, parse_layers, plan_shards
from airstream.repacking.report import RepackReport
from airstream.repacking.target import check_target, is_done
from airstream.repacking.write import copy_small, header_of, sha256_of, write_shard
from airstream.reporting.paths import path_of
from airstream.reporting.status import status
from airstream.reporting.units import parse_shard_size
from airstream.system.cache import sync
from airstream.system.disk_space import check_file_size, check_free_space, named_when_full

NOT_COPIED = re.compile(
    r"\..*|.*\.(safetensors|bin|pth|pt|gguf|h5|msgpack|onnx|ot|tflite|index\.json)|" + re.escape(MANIFEST)
)
"""Files of weights, which are rewritten, and copies of them in other formats; hidden files."""


GOES_ON = "Free some and run the same again: it keeps what is finished and goes on from there"


def repack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: str | range | tuple[int, int] | None = None,
    shard_size: int | str = "4GiB",
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write the checkpoint `model` to the folder `out`, each layer as one run of bytes that begins on a page.

    The tensors keep their names and their bytes, and all small files are copied as they are, so that transformers loads
    the result like the original. `airstream-repack.json` in it says what it was made from and has the checksum of every
    file. A run that was killed goes on where it was. Blocks; its buffers are 16 MiB for any model.

    Args:
        model: a folder or hub id; safetensors or pickles. It is only read.
        out: a folder that does not exist or is empty. A complete repack of the same checkpoint is left as it is.
        layers: `"5:15"` writes layers 5 to 14 only, for a machine that runs only these. What comes before the layers
            (embeddings) goes with the first layer, what comes behind them (norm, lm_head) with the last.
        shard_size: what a file should not be larger than; a layer is never cut.
        progress: show a bar on standard error, if that is a terminal.
        options: subfolder, variant, revision, token, cache_dir, local_files_only, trust_remote_code as in
            `AutoModel.from_pretrained`.

    Raises:
        ArgumentError: `out` is in use for something else, or `layers` are not there.
        CheckpointError: the checkpoint is incomplete or corrupt.
        DiskSpaceError: the disk has not enough room; the message has the numbers. What is finished is kept.
        UnsupportedError: the checkpoint is a GGUF file.
    """
    return repack_and_report(model, out, layers=layers, shard_size=shard_size, progress=progress, **options).folder


def repack_and_report(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: str | range | tuple[int, int] | None = None,
    shard_size: int | str = "4GiB",
    progress: bool = True,
    **options: Any,
) -> RepackReport:
    """As `repack`, which see; gives what was done, too."""
    started = time.monotonic()
    check_name(model)
    check_flag("progress", progress)
    refuse_others(options, SOURCE_OPTIONS)
    target = path_of("out", out).absolute()
    shard_bytes = parse_shard_size(shard_size)
    with status(f"planning {Path(model).absolute().name}", progress, is_timed=False):  # the hub may draw bars
        prepared = prepare(model, LoadOptions(device="cpu", **options))
    check_target(target, prepared.folder)
    shards, chosen = _planned(prepared, layers, shard_bytes)
    largest = max(shards, key=lambda shard: shard.nbytes)
    smaller = ", or name a smaller shard_size=... (a layer is never cut)"
    check_file_size(len(header_of(largest)) + largest.nbytes, "repacking", smaller)
    recipe = {
        "format": FORMAT,
        "source": fingerprint(prepared.index.files),
        "layers": None if chosen is None else list(chosen),
        "shards": {shard.file: [tensor.name for tensor in shard.tensors] for shard in shards},
    }
    known = digest_of(recipe)
    facts = {"recipe": known} | {name: recipe[name] for name in recipe if name != "shards"}
    kept = _write(target, prepared.folder, shards, facts, progress)
    return RepackReport(
        target,
        num_files=len(shards),
        num_bytes=sum((target / shard.file).stat().st_size for shard in shards),
        kept_files=len(shards) if kept is None else kept,
        is_old=kept is None,
        seconds=time.monotonic() - started,
    )


def _write(target: Path, source: Path, shards: Sequence[Shard], facts: Mapping[str, Any], progress: bool) -> int | None:
    """Fill the folder beside `target` that takes its name when it is complete.

    Returns how many files of weights were kept from a run before; None if all is there and nothing was to be done.
    """
    lock = target.with_name(f".{target.name}-repacking.lock")
    work = target.with_name(f".{target.name}-repacking")
    job = _Repack(work, source, shards, facts, progress)
    try:
        with named_when_full(work, job.missing_bytes, "repacking", GOES_ON):
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=0):
                is_complete = is_done(target, facts)
                try:
                    if not is_complete:
                        job.fill()
                        _give_name(work, target)
                finally:
                    if not job.has_finished_any():  # there is nothing to go on from
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


def _planned(
    prepared: Prepared, layers: str | range | tuple[int, int] | None, shard_bytes: int
) -> tuple[list[Shard], tuple[int, int] | None]:
    model, index = prepared.model, prepared.index
    if isinstance(index, GgufIndex):
        raise UnsupportedError(
            f"{index.first} is GGUF, which safetensors cannot hold: airstream reads it as it lies, name it as the model"
        )
    unknown = next((tensor for tensor in index.values() if tensor.dtype not in ITEM_BYTES), None)
    if unknown is not None:
        raise UnsupportedError(
            f"tensor {unknown.name!r} is stored as {unknown.dtype}, which safetensors has no name for"
        )
    stacks = find_units(model)
    if layers is not None and len(stacks) != 1:
        raise ArgumentError(f"layers={layers!r}: {type(model).__name__} has {len(stacks)} stacks of layers, not one")
    chosen = parse_layers(layers, len(stacks[0])) if layers is not None else None
    names = list(model.state_dict())
    members = _members(index, MappedConversion(model), set(names))
    return plan_shards(members, Order(names, stacks, tied_names(model)), chosen, shard_bytes), chosen


def _members(index: CheckpointIndex, conversion: KeyConversion, names: set[str]) -> list[Member]:
    renamed = ((key, conversion.rename(key)[0]) for key in natural_order(index))
    return [Member(index[key], name if name in names else None) for key, name in renamed]


class _Repack:
    """One repack under way in the folder `work`."""

    def __init__(
        self, work: Path, source: Path, shards: Sequence[Shard], facts: Mapping[str, Any], progress: bool
    ) -> None:
        self._work = work
        self._source = source
        self._shards = shards
        self._facts = dict(facts)
        self._progress = progress
        self._done: dict[str, dict[str, Any]] = {}
        self.num_kept = 0

    def has_finished_any(self) -> bool:
        """Whether a file of weights is there, of this run or one before, so that another one can go on."""
        return any(self._work.glob("*.safetensors"))

    def missing_bytes(self) -> int:
        """What is still to be written."""
        missing = [shard for shard in self._shards if shard.file not in self._done]
        small = [file for file in copied_files(self._source) if file.name not in self._done]
        return sum(len(header_of(shard)) + shard.nbytes for shard in missing) + sum(
            file.stat().st_size for file in small
        )

    def fill(self) -> None:
        """Write what is not there yet, the manifest last."""
        from tqdm import tqdm

        self._work.mkdir(exist_ok=True)
        total = sum(shard.nbytes for shard in self._shards)
        off = None if self._progress else True
        with tqdm(total=total, unit="B", unit_scale=True, desc="repacking", disable=off) as bar:
            self._take_over(bar.update)
            check_free_space(self._work, self.missing_bytes(), f"repacking into {self._work.parent}", GOES_ON)
            for shard in self._shards:
                if shard.file not in self._done:
                    self._note(shard.file, write_shard(self._work / shard.file, shard, bar.update))
        for file in copied_files(self._source):
            copy_small(file, self._work / file.name)
            sync(self._work / file.name)
            self._note(file.name, sha256_of(self._work / file.name))
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


def copied_files(folder: Path) -> list[Path]:
    """The small files of a checkpoint, which belong to any copy of it: config, tokenizer, code."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not NOT_COPIED.fullmatch(file.name)]
