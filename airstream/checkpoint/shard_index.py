"""This reads the index of a sharded checkpoint: which tensor is in which file. It opens no shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from airstream.errors import CheckpointError
from airstream.system.foreign_json import INDEX, read_json

MAX_FILE_NAME_BYTES = 255
"""What file systems allow."""


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, as the index file `index` says. Shards lie beside it: whatever else it names is refused.

    Raises:
        CheckpointError: it is not an index, or names something outside its folder.
    """
    contents = read_json(index, INDEX, unique=True)
    weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is not a shard index: it has no weight_map of tensors. Download it again")
    for name, shard in weight_map.items():
        if not _is_file_name(shard):
            raise CheckpointError(
                f"{index} places {name[:200]!r} in the shard {str(shard)[:200]!r}: shards must lie beside the index"
            )
    return weight_map


def _is_file_name(shard: Any) -> bool:
    """Whether `shard` names a file of the folder, on any system."""
    if not isinstance(shard, str) or shard in ("", ".", "..") or not set("/\\\0").isdisjoint(shard):
        return False
    return len(shard) <= MAX_FILE_NAME_BYTES and len(shard.encode()) <= MAX_FILE_NAME_BYTES
