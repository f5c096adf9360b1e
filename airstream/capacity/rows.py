"""A row has the numbers of one model at one precision on one card. It knows neither plans nor how rows are printed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["fits", "streams", "does not fit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model at one precision on one card.

    Attributes:
        vram_bytes: all memory of the card. The budgets, `vram_budget_bytes` and `ram_budget_bytes`, are less.
        weights_bytes: of all weights.
        context, batch_size: tokens and sequences that are planned for; unless a context was given, the longest one that
            the budgets hold, up to 4096.
        kv_bytes_per_token: keys and values of one token of one sequence; `kv_bytes` of all that is planned for.
        needed_bytes: device memory that would hold everything: weights, KV cache, activations, what CUDA needs to run.
        verdict: "fits" if no weights are streamed, else "streams", or "does not fit".
        resident_bytes, hosted_bytes: weights that stay in device memory, and in host memory.
        least_vram_bytes, least_ram_bytes: budgets of the smallest plan there is, where these do not do.
        decode_seconds, bottleneck: predicted, of one token for every sequence; None if it does not fit.
        first_token_seconds: predicted, of the first call: weights come from disk.
    """

    model: str
    precision: str
    card: str
    vram_bytes: int
    vram_budget_bytes: int
    ram_budget_bytes: int
    weights_bytes: int
    context: int
    batch_size: int
    kv_bytes_per_token: int
    kv_bytes: int
    needed_bytes: int
    verdict: Verdict
    resident_bytes: int = 0
    hosted_bytes: int = 0
    least_vram_bytes: int | None = None
    least_ram_bytes: int | None = None
    decode_seconds: float | None = None
    first_token_seconds: float | None = None
    bottleneck: str | None = None


def short_name(model: str | os.PathLike[str]) -> str:
    """A hub id as it is; of a folder, what it is called."""
    return Path(model).resolve().name if Path(model).is_dir() else os.fspath(model)
