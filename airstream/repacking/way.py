"""A way is how a checkpoint is written anew, as data. `ways` has those that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airstream.checkpoint.safetensors_writer import METADATA
from airstream.checkpoint.stored import StoredTensor
from airstream.layout.shards import Shard
from airstream.repacking.write import OnBytes

__all__ = ["Way"]


@dataclass(frozen=True, slots=True)
class Way:
    """How a checkpoint is written.

    Attributes:
        write: what writes a file, and gives its SHA-256.
        expected_bytes: that the file is going to have, or about so many.
        on_pages: every layer begins on a page of a file.
        made_of: what is written in the place of a tensor.
        metadata: what the header of every file says.
        config: gives the contents of config.json, of that of the source; None if they stay as they are.
    """

    write: Callable[[Path, Shard, OnBytes], str]
    expected_bytes: Callable[[Shard], int]
    on_pages: bool = False
    made_of: Callable[[StoredTensor], Sequence[StoredTensor]] = lambda tensor: (tensor,)
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)
    config: Callable[[Path], Mapping[str, Any]] | None = None
