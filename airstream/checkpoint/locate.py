"""This says where a model's description and weights are: a folder with a checkpoint, or a GGUF file that is both.

It knows how a user may name a GGUF file. What a folder or a hub id is, and how it is downloaded, `hub` knows.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from airstream.checkpoint.gguf_split import SPLIT_NAME, split_names
from airstream.checkpoint.hub import AS_EVER, HubOptions, check_name, resolve
from airstream.checkpoint.names import is_inside
from airstream.errors import ArgumentError, CheckpointNotFoundError
from airstream.reporting.alike import meant_path
from airstream.reporting.kinds import what_lies
from airstream.system.foreign_files import check_folder, unreadable

SUFFIX = ".gguf"


class Location(NamedTuple):
    """The folder of a checkpoint, and the GGUF file in it that is the checkpoint, if one is."""

    folder: Path
    gguf: Path | None = None


def locate(
    model: str | os.PathLike[str],
    hub: HubOptions = AS_EVER,
    gguf_file: str | None = None,
    with_code: bool = False,
    with_weights: bool = True,
) -> Location:
    """Find `model`: a folder, a hub id, or a path to a GGUF file. Downloads what is not here.

    Args:
        gguf_file: the GGUF file in the folder or repository; of one that is split, any part.
        with_code, with_weights: download these, too. A GGUF file is downloaded whole in any case: it has the config.

    Raises:
        CheckpointNotFoundError: there is no such folder, repository or file.
        CheckpointError: it may not be read.
        ArgumentError: `gguf_file` is not a path inside the repository.
    """
    try:
        found = _locate(model, hub, gguf_file, with_code, with_weights)
    except PermissionError as error:
        raise unreadable(Path(error.filename or model), error) from error
    check_folder(found.folder)
    return found


def _locate(
    model: str | os.PathLike[str], hub: HubOptions, gguf_file: str | None, with_code: bool, with_weights: bool
) -> Location:
    check_name(model)
    if gguf_file is None:
        path = Path(model).expanduser()
        if path.suffix == SUFFIX and not path.is_dir():
            if os.path.lexists(path) and not path.is_file():
                raise CheckpointNotFoundError(f"{os.fspath(model)!r} is {what_lies(path)}: name a GGUF file")
            if not path.is_file():
                raise CheckpointNotFoundError(
                    f"there is no file {os.fspath(model)!r}. One in a hub repository is named with gguf_file=..."
                    f"{meant_path(os.fspath(model))}"
                )
            if hub.subfolder:
                raise ArgumentError(f"subfolder= is of a folder or repository, and {os.fspath(model)!r} is a file")
            return Location(path.parent, path)
        folder = resolve(model, hub, with_code, with_weights)
        return Location(folder, _only_gguf(folder))
    inside = PurePosixPath(gguf_file)
    if inside.suffix != SUFFIX or not is_inside(gguf_file):
        raise ArgumentError(f"gguf_file={gguf_file!r} is not the path of a {SUFFIX} file inside the repository")
    if Path(model).expanduser().is_file():
        raise ArgumentError(f"{os.fspath(model)!r} is a file already: gguf_file={gguf_file!r} names one in a folder")
    wanted = [str(inside.with_name(name)) for name in split_names(inside.name)]
    folder = resolve(model, hub, with_code, weight_files=wanted)
    file = folder / gguf_file
    if not file.is_file():
        raise CheckpointNotFoundError(f"{os.fspath(model)!r} has no file {gguf_file!r}{_choice(folder)}")
    return Location(folder, file)


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF checkpoint of a folder that holds nothing else."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files or (folder / "config.json").is_file():
        return None
    checkpoints = {match["stem"] if (match := SPLIT_NAME.fullmatch(file.name)) else file.name for file in files}
    if len(checkpoints) > 1:
        raise ArgumentError(f"{folder} has several models: say which with gguf_file=...{_choice(folder)}")
    return files[0]


def _choice(folder: Path) -> str:
    names = sorted(file.name for file in folder.glob(f"*{SUFFIX}"))
    return f"; there are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""
