"""This says whether a checkpoint is a part of a model, of which a repack has kept some layers only."""

from __future__ import annotations

from pathlib import Path

from airstream.checkpoint.names import MANIFEST
from airstream.errors import CheckpointError
from airstream.system.foreign_json import MANIFEST as MANIFEST_KIND
from airstream.system.foreign_json import read_json


def kept_layers(folder: Path) -> tuple[int, int] | None:
    """The layers that were kept, (first, behind the last), by the manifest in `folder`; None if it says of none."""
    try:
        manifest = read_json(folder / MANIFEST, MANIFEST_KIND)
    except CheckpointError:  # there is none, most of the time
        return None
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    if not isinstance(layers, list) or [type(each) for each in layers] != [int, int]:
        return None
    return layers[0], layers[1]
