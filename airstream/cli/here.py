"""This says what a model's name leads to on this machine, and what a command lacks there, before torch is imported.

It knows which files are needed, and what config.json may say. It refuses to know hub ids, and weights.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from airstream.checkpoint.config_file import read_model_config
from airstream.checkpoint.names import CONFIG_FILE
from airstream.checkpoint.weight_files import no_checkpoint, weight_files
from airstream.cli.starting import starting

__all__ = ["check_checkpoint", "check_config", "exists", "refuse_empty"]


def exists(name: str) -> bool:
    """Whether `name` leads to something; a long text is the name of nothing."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, has a zero byte, of a home that is nowhere
        return False


def check_checkpoint(name: str, arguments: argparse.Namespace) -> None:
    """Refuse what is here under the `name` of a model unless it has weights and a config, by their files' names.

    Raises:
        AirstreamError: as loading it would, in the same words.
    """
    folder = _folder_of(name, arguments)
    if folder is not None:
        if not weight_files(folder, arguments.variant):
            raise no_checkpoint(folder, arguments.variant)
        read_model_config(folder)


def check_config(name: str, arguments: argparse.Namespace) -> None:
    """As `check_checkpoint`, for what needs no weights."""
    folder = _folder_of(name, arguments)
    if folder is not None:
        read_model_config(folder)


def refuse_empty(name: str, arguments: argparse.Namespace) -> None:
    """As `check_checkpoint`, where everything that is wrong is told at its end: refuse what has nothing of a model."""
    folder = _folder_of(name, arguments)
    if folder is not None and not (folder / CONFIG_FILE).exists() and not weight_files(folder, arguments.variant):
        raise no_checkpoint(folder, arguments.variant)


def _folder_of(name: str, arguments: argparse.Namespace) -> Path | None:
    """The folder here that `name` leads to; None if that may be on a hub, or is a GGUF file, which has it all."""
    try:
        is_here = os.path.lexists(Path(name).expanduser())
    except (OSError, ValueError, RuntimeError):
        return None
    if not is_here:
        return None
    with starting():  # it brings the hub's library, which takes an interrupt for an answer, too
        from airstream.checkpoint.hub import HubOptions
        from airstream.checkpoint.locate import locate
    hub = HubOptions(subfolder=arguments.subfolder or "", variant=arguments.variant)
    found = locate(name, hub, arguments.gguf_file)
    return found.folder if found.gguf is None else None
