"""What is prepared is a model without weights, and everything that is known about it before the first one is read.

It refuses to know how that was found out, and what is made of it: a plan, a table, or a running model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from airstream.checkpoint.stored import CheckpointIndex
from airstream.compat.quantizer import Quantizer
from airstream.layout.parts import Parts
from airstream.loading.options import LoadOptions
from airstream.plan.facts import ModelFacts
from airstream.plan.request import Request


@dataclass(frozen=True)
class Prepared:
    """Everything known about a model before the first weight is read.

    Attributes:
        staged: reads into host memory go through staging buffers.
        request: what is asked of the planner.
    """

    options: LoadOptions
    folder: Path
    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    index: CheckpointIndex
    parts: Parts
    facts: ModelFacts
    staged: bool
    request: Request
    quantizer: Quantizer | None = None
