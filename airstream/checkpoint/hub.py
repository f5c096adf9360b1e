"""This goes from what the user names to a folder with a checkpoint: a local folder, or a hub id by huggingface_hub.

Downloads show progress, resume where they broke off, and are verified by huggingface_hub. Only what is needed comes:
configuration and tokenizer first, then the shards that the checkpoint's own index names; safetensors if there are any,
pickles if not.

It knows names of files. It refuses to know what is in them, but for the index of shards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from airstream.checkpoint.hub_errors import explain
from airstream.checkpoint.names import PICKLE_FILE, PICKLE_INDEX, SHARD_INDEX, SINGLE_FILE, file_name
from airstream.checkpoint.shard_index import read_weight_map
from airstream.errors import AirstreamError, ArgumentError, CheckpointNotFoundError, UnsupportedError
from airstream.reporting.alike import meant_path
from airstream.reporting.kinds import what_lies
from airstream.system.foreign_files import open_regular, unreadable
from airstream.system.impostors import AS_WHAT, HEAD_BYTES, what_it_is

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]

MAX_SHOWN = 60
"""Characters of a name that is no path."""

ADDRESS = re.compile(
    r"(?:[a-z]+://[^/]*|(?:www\.)?(?:huggingface\.co|hf\.co))/*"
    r"(?P<repository>[\w.-]+/[\w.-]+)?(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+))?"
)
"""Of a page or file of a hub: what is pasted from a browser."""


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How a checkpoint is looked for, as transformers and huggingface_hub call it.

    Attributes:
        subfolder: of the folder or repository, where the checkpoint lies.
        variant: of the weights, which their files' names have before the ending.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    subfolder: str = ""
    variant: str | None = None


AS_EVER = HubOptions()


def resolve(
    model: str | os.PathLike[str],
    hub: HubOptions = AS_EVER,
    with_code: bool = False,
    with_weights: bool = True,
    weight_files: Sequence[str] | None = None,
) -> Path:
    """The folder of checkpoint `model`: a local folder, used in place, or a hub id, downloaded into the hub's cache.

    Args:
        weight_files: the files of weights to download, if not those of the checkpoint that config.json belongs to.

    Raises:
        CheckpointNotFoundError: there is no such folder or repository, or it cannot be reached; the message says which.
    """
    local = _local_folder(model)
    if local is not None:
        return _inside(local, hub.subfolder, model)
    name = os.fspath(model)

    def download(patterns: list[str]) -> Path:
        code = ["*.py"] if with_code else []
        folder = Path(
            snapshot_download(
                name,
                revision=hub.revision,
                token=hub.token,
                cache_dir=hub.cache_dir,
                local_files_only=hub.local_files_only,
                allow_patterns=[str(PurePosixPath(hub.subfolder, pattern)) for pattern in patterns + code],
            )
        )
        return _inside(folder, hub.subfolder, name)

    try:
        if weight_files is not None:
            return download([*SMALL_FILES, *weight_files])
        folder = download(SMALL_FILES)
        return _download_weights(folder, hub.variant, download) if with_weights else folder
    except AirstreamError:
        raise
    except (HTTPError, HFValidationError, OSError) as error:
        raise explain(error, name, hub.revision, hub.token, hub.cache_dir) from error


def check_name(model: object) -> None:
    """Raise unless `model` can be what a model is called: a path, or a hub id.

    Raises:
        ArgumentError: the message has the name to write instead, if it is an address.
    """
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise ArgumentError(f"the model's name is {model!r}: name a folder, a GGUF file or a hub id")
    if not name:
        raise ArgumentError("the model's name is empty: name a folder or a hub id")
    try:
        Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, not readable, of a home that is nowhere
        shown = name if len(name) < MAX_SHOWN else name[:MAX_SHOWN] + "..."
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(f"{shown!r} cannot be the name of a folder or a file: {reason}") from error
    if address := ADDRESS.match(name):
        repository, revision = address["repository"], address["revision"]
        meant = f'"{repository}"' if repository else 'the repository alone, as in "organisation/model"'
        extra = f', revision="{revision}"' if revision else ""
        raise ArgumentError(f"{name!r} is an address: name {meant}{extra}")


def _local_folder(model: str | os.PathLike[str]) -> Path | None:
    """The folder that `model` is; None if it can only be a hub id."""
    check_name(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UnsupportedError(_instead_of(path))
    name = os.fspath(model)
    if os.path.lexists(path):  # a pipe, or a link that leads nowhere: no hub is asked for what is here
        raise CheckpointNotFoundError(
            f"{name!r} is {what_lies(path) or 'not readable'}: name the folder of a checkpoint"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.is_absolute():
        raise CheckpointNotFoundError(f"there is no folder {name!r}{meant_path(name)}")
    return None


def _instead_of(file: Path) -> str:
    """What to name instead of `file`, which is there, but does not have the name of a checkpoint."""
    with open_regular(file) as opened:
        try:
            head = opened.read(HEAD_BYTES)
        except OSError as error:  # /proc has files of which nothing can be read
            raise unreadable(file, error) from error
    if what_it_is(head, "") == AS_WHAT["gguf"]:
        return f"{file} is {AS_WHAT['gguf']}"
    if (file.parent / "config.json").is_file():
        return f"{file} is a file of a checkpoint: name its folder, {os.fspath(file.absolute().parent)!r}"
    return f"{file} is a file: name the folder of a checkpoint, with config.json and weights, or a .gguf file"


def _inside(folder: Path, subfolder: str, model: str | os.PathLike[str]) -> Path:
    if not (folder / subfolder).is_dir():
        raise CheckpointNotFoundError(f"{os.fspath(model)!r} has no folder {subfolder!r}, which subfolder= names")
    return folder / subfolder


def _weight_files(folder: Path, variant: str | None) -> Iterator[list[str]]:
    """What to ask for, one after the other until something of it is there: nothing says which weights there are.

    The shards that an index names, or the one file there is without an index.
    """
    shard_index, pickle_index = (folder / file_name(name, variant) for name in (SHARD_INDEX, PICKLE_INDEX))
    if shard_index.is_file():
        yield sorted(set(read_weight_map(shard_index).values()))
        return
    yield [file_name(SINGLE_FILE, variant)]
    if pickle_index.is_file():
        yield sorted(set(read_weight_map(pickle_index).values()))
        return
    yield [file_name(PICKLE_FILE, variant)]
    if variant is None:
        yield ["*.pth"]


def _download_weights(folder: Path, variant: str | None, download: Callable[[list[str]], Path]) -> Path:
    for names in _weight_files(folder, variant):
        download(SMALL_FILES + names)
        if any(any(folder.glob(name)) for name in names):
            break
    return folder
