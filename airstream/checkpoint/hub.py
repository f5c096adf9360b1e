"""From what the user names to a folder with a checkpoint: a local folder as it is, a hub id through huggingface_hub.

Downloads show progress, resume where they broke off, and are verified by huggingface_hub. Only what is needed comes:
configuration and tokenizer first, then the shards that the checkpoint's own index names; safetensors if there are any,
pickles if not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from airstream.checkpoint.formats import PICKLE_FILE, PICKLE_INDEX
from airstream.checkpoint.index import SHARD_INDEX, SINGLE_FILE, read_weight_map
from airstream.errors import ArgumentError, CheckpointNotFoundError, UnsupportedError

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def resolve(
    model: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
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
        return local
    name = os.fspath(model)

    def download(patterns: list[str]) -> Path:
        code = ["*.py"] if with_code else []
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=patterns + code,
            )
        )

    try:
        if weight_files is not None:
            return download([*SMALL_FILES, *weight_files])
        folder = download(SMALL_FILES)
        return _download_weights(folder, download) if with_weights else folder
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointNotFoundError(
            f"the hub does not give out {name!r} (revision {revision or 'main'}): {_first_line(error)}. "
            "Check the name; for a private or gated model accept its licence there and pass token=..."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointNotFoundError(
            f"{name!r} is neither a local folder nor complete in the hub's cache, and the hub cannot be used "
            "(offline, or local_files_only=True). Connect once to download it, or name a local folder"
        ) from error
    except HFValidationError as error:
        raise CheckpointNotFoundError(
            f"{name!r} is neither a local folder nor a hub id: {_first_line(error)}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointNotFoundError(
            f"downloading {name!r} failed: {_first_line(error)}. Try again: it resumes"
        ) from error


def _local_folder(model: str | os.PathLike[str]) -> Path | None:
    """The folder that `model` is; None if it can only be a hub id."""
    if not os.fspath(model):
        raise ArgumentError("the model's name is empty: name a folder or a hub id")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UnsupportedError(
            f"{path} is a file: name the folder of a checkpoint, with config.json and weights (a .gguf is only loaded)"
        )
    name = os.fspath(model)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.is_absolute():
        raise CheckpointNotFoundError(f"there is no folder {name!r}")
    return None


def _weight_files(folder: Path) -> Iterator[list[str]]:
    """What to ask for, one after the other until something of it is there: nothing says which weights there are.

    The shards that an index names, or the one file there is without an index.
    """
    if (folder / SHARD_INDEX).is_file():
        yield sorted(set(read_weight_map(folder / SHARD_INDEX).values()))
        return
    yield [SINGLE_FILE]
    if (folder / PICKLE_INDEX).is_file():
        yield sorted(set(read_weight_map(folder / PICKLE_INDEX).values()))
    else:
        yield [PICKLE_FILE]
        yield ["*.pth"]


def _download_weights(folder: Path, download: Callable[[list[str]], Path]) -> Path:
    for names in _weight_files(folder):
        download(SMALL_FILES + names)
        if any(any(folder.glob(name)) for name in names):
            break
    return folder


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
