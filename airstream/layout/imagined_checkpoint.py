"""This is a checkpoint that is not there, as far as a model can be built for it. It knows no codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from airstream.checkpoint.stored import CheckpointIndex

__all__ = ["Imagined"]


@dataclass(frozen=True, slots=True)
class Imagined:
    """A checkpoint that is not there.

    Attributes:
        index: its tensors.
        headers: the files whose headers say more, or what they would say.
        dtype: what its config says that it computes in; None if that is what the config of the plain one says.
        settings: what its config says besides, as `quantization_config`.
    """

    index: CheckpointIndex
    headers: Sequence[Path] | Mapping[str, str]
    dtype: torch.dtype | None = None
    settings: Mapping[str, Any] | None = None
