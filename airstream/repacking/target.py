"""This says where a repack goes, and what may lie there: nothing, or the same repack. It writes nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airstream.errors import ArgumentError
from airstream.repacking.manifest import read_manifest
from airstream.reporting.kinds import what_lies
from airstream.reporting.paths import path_of

MAX_STEM = 200
"""Bytes of a name that the names beside it repeat: systems take 255, and they have some more."""


def target_of(out: str | os.PathLike[str]) -> Path:
    """The folder that `out` names. A link is followed to a folder, or to where one can be made.

    Raises:
        ArgumentError: it is a file, a link that leads in a circle, or inside something that is no folder.
    """
    named = path_of("out", out).absolute()
    target = Path(os.path.realpath(named)) if named.is_symlink() else named
    if not target.name:
        raise ArgumentError(f"{named} is not empty, nor a repack: name another folder")
    lies = what_lies(target)
    if lies and not target.is_dir():
        raise ArgumentError(f"{named} is {lies}: name a folder")
    return target


def beside(target: Path) -> Path:
    """The hidden folder beside `target` that takes its name when it is complete."""
    name = target.name
    if len(os.fsencode(name)) > MAX_STEM:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return target.with_name(f".{name}-repacking")


def check_target(target: Path, folder: Path) -> None:
    """Refuse a `target` inside the checkpoint in `folder`."""
    real, source = Path(os.path.realpath(target)), Path(os.path.realpath(folder))
    if real == source or source in real.parents:
        raise ArgumentError(
            f"{target} is inside the checkpoint {folder}, which is never written to: name another folder"
        )


def is_done(target: Path, facts: Mapping[str, Any]) -> bool:
    """Whether `target` is what `facts` describe already; False if there is nothing.

    Raises:
        ArgumentError: there is something else; the message says what.
    """
    if not target.exists() or not any(target.iterdir()):
        return False
    there = read_manifest(target)
    if there is None:
        raise ArgumentError(f"{target} is not empty, nor a repack: name another folder")
    if there.get("recipe") == facts["recipe"]:
        return True
    if there.get("source") != facts["source"]:
        what = "a repack of another checkpoint, or of this one before it was changed"
    elif there.get("codec") != facts.get("codec"):
        what = f"a repack of the same checkpoint with {_codec_of(there)}, not with {_codec_of(facts)}"
    elif there.get("layers") != facts["layers"]:
        what = f"a repack of the same checkpoint with {_layers_of(there)}, not with {_layers_of(facts)}"
    else:
        what = "a repack of the same checkpoint already, in files of other sizes (shard_size=...)"
    raise ArgumentError(f"{target} is {what}: use it as it is, remove it first, or name another folder")


def _layers_of(facts: Mapping[str, Any]) -> str:
    layers = facts.get("layers")
    return "all layers" if layers is None else f"layers {layers[0]} to {layers[1] - 1}"


def _codec_of(facts: Mapping[str, Any]) -> str:
    codec = facts.get("codec")
    return "no codec" if codec is None else f"codec={codec!r}"
