"""This keeps checkpoints that were packed on loading, in the cache folder: each is made once, whoever asks first.

It knows where they lie and how they are told apart. It refuses to know how one is packed.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from airstream.checkpoint.formats import open_checkpoint
from airstream.checkpoint.locate import locate
from airstream.codecs.names import LOSSLESS_CODEC
from airstream.compat.asked_formats import AskedFormat
from airstream.errors import AirstreamError, CheckpointError, DiskSpaceError, UnsupportedError
from airstream.layout.packable import may_pack
from airstream.loading.asked import codec_name, reworded
from airstream.loading.options import LoadOptions
from airstream.repacking.kept import is_made
from airstream.repacking.manifest import digest_of, read_manifest
from airstream.repacking.repack import repack_and_report
from airstream.repacking.source import Source, state_of
from airstream.repacking.unfinished import what_is_in_the_way
from airstream.repacking.write import sha256_of
from airstream.system.in_use import lock_of, packed_folder

logger = logging.getLogger(__name__)

WEIGHTS = ".safetensors"
"""What the names of its files of weights end with."""

MAX_NAME = 40
"""Letters of a checkpoint's name that stand in that of its copy."""


def packed_copy(
    name: str | os.PathLike[str],
    options: LoadOptions,
    compression: str | AskedFormat,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """The folder with the checkpoint `name`, packed as `compression` says. Made unless it is there.

    It is that of the checkpoint itself where nothing can be packed without loss.

    `check` is called before it is made: what it raises is raised, and nothing has been written.

    Blocks while another process makes it. Memory is that of a repack; one that was killed goes on where it was.

    Raises:
        ArgumentError: there is no such codec.
        DiskSpaceError: the disk of the cache folder has not enough room.
        CheckpointError: the checkpoint is incomplete or corrupt.
    """
    codec = codec_name(compression)
    folder, gguf = locate(name, options.hub, options.gguf_file, options.trust_remote_code)
    if gguf is not None:
        raise UnsupportedError(f"{gguf} is packed already, as GGUF: leave compression={compression!r} out")
    index = open_checkpoint(folder, variant=options.variant)
    if codec == LOSSLESS_CODEC and not any(may_pack(tensor) for tensor in index.values()):
        logger.warning("%s has no weights in bfloat16 that are not packed: it is streamed as it is", folder)
        return folder
    source = state_of(folder, index.files)
    facts = {"folder": str(folder), "source": source.weights, "small": source.small, "codec": codec}
    if isinstance(compression, AskedFormat):
        facts |= {"settings": compression.settings, "dtype": str(compression.dtype)}
    made_of = digest_of(facts)
    target = packed_folder() / f"{folder.name[:MAX_NAME]}-{codec}-{made_of[:12]}"
    if _is_made(target):
        return target
    check()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with reworded(compression), FileLock(lock_of(target)):
            if not _is_made(target):  # else another process made it while this one waited for the lock
                _refuse_foreign(target.with_name(f".{target.name}-repacking"))
                _remove(target)
                _make(source, index.files, target, compression, options)
    except AirstreamError:
        raise
    except OSError as error:
        raise DiskSpaceError(
            f"{target.parent}, where {target.name} would be kept, cannot be written ({error.strerror}): set "
            "AIRSTREAM_CACHE to a folder that can be"
        ) from error
    return target


def _is_made(target: Path) -> bool:
    """A repack takes its name when it is whole. Its files may have been damaged, or removed, since: sizes tell, the
    headers of weights, and the checksums of what is small. Weights are not read: `airstream verify` does that.
    """
    if not is_made(target):
        return False
    try:
        files = (read_manifest(target) or {})["files"]
        small = [name for name in files if not name.endswith(WEIGHTS)]
        is_sound = all(sha256_of(target / name) == files[name]["sha256"] for name in small)
        return is_sound and bool(open_checkpoint(target))
    except (CheckpointError, OSError):
        return False


def _refuse_foreign(work: Path) -> None:
    if what := what_is_in_the_way(work):
        raise DiskSpaceError(
            f"{work}, in which it would be packed, is {what}: remove it, or set AIRSTREAM_CACHE to another folder"
        )


def _remove(target: Path) -> None:
    """What is damaged is made anew: it is of the cache."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)


def _make(source: Source, files: Iterable[Path], target: Path, codec: str | AskedFormat, options: LoadOptions) -> None:
    def begins() -> None:
        source.check_weights(files)  # the copy is called by what it was
        source.check_small()
        logger.warning("packing %s with codec %s, once, into %s", source.folder, codec_name(codec), target)

    known: dict[str, Any] = {"variant": options.variant, "trust_remote_code": options.trust_remote_code}
    report = repack_and_report(
        source.folder, target, codec=codec, progress=bool(options.progress), begins=begins, **known
    )
    logger.warning("packed it: %s", report)
