"""This says what may lie where a repacked checkpoint goes: nothing, or the same repack. It writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airstream.errors import ArgumentError
from airstream.repacking.manifest import read_manifest


def check_target(target: Path, folder: Path) -> None:
    """Refuse a `target` that is a file, or inside the checkpoint in `folder`."""
    real, source = target.resolve(), folder.resolve()
    if real == source or source in real.parents:
        raise ArgumentError(
            f"{target} is inside the checkpoint {folder}, which is never written to: name another folder"
        )
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"{target} is a file: name a folder")


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
