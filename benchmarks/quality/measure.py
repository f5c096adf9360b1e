"""How one form of a model reads a text and answers questions, and how far that is from what another form does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from airstream import AutoModel
from airstream.compat.traits import cache_keyword
from airstream.layout.parts import Kind
from airstream.loading.options import LoadOptions
from airstream.loading.prepare import prepare
from airstream.plan.planner import smallest_plan

FEW = 8
"""Tokens that fast kernels multiply with packed weights at once; more are multiplied by torch. Also answers at once."""


@dataclass(frozen=True)
class Form:
    """A checkpoint, and the kernels that multiply with it."""

    name: str
    path: Path
    kernels: str = "exact"


@dataclass(frozen=True)
class Task:
    """What every form does: reads `windows` (count, length), and answers `prompts` with `new_tokens` each.

    With fast kernels, eight tokens at a time, that takes long: they read the first `fast_windows`, and answer nothing.
    """

    windows: torch.Tensor
    prompts: Sequence[list[int]]
    new_tokens: int
    fast_windows: int
    max_memory: str | None = None


@dataclass
class Reading:
    """What a form did: logits for each window (length, vocabulary), and the tokens of each answer."""

    logits: list[torch.Tensor] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)


def layer_bytes(path: Path) -> int:
    """Bytes that a token reads from disk for the layers if none of them is kept in memory."""
    prepared = prepare(path, LoadOptions(device="cpu", max_context=FEW, max_memory="1TiB", dtype="bfloat16"))
    layers = {part.name for part in prepared.parts.of(Kind.LAYER)}
    plan = smallest_plan(prepared.facts, prepared.request)
    return sum(batch.read_bytes for batch in plan.batches if layers.issuperset(batch.units))


@torch.no_grad()
def read(form: Form, task: Task) -> Reading:
    """Let `form` do the `task`, in bfloat16. Holds the logits of all windows: two bytes for each number."""
    is_fast, longest = form.kernels == "fast", max(len(prompt) for prompt in task.prompts)
    options: dict[str, Any] = {
        "device": "cpu",
        "dtype": "bfloat16",
        "kernels": form.kernels,
        "max_context": max(task.windows.shape[1], longest + task.new_tokens),
        "max_batch_size": FEW,
        "max_memory": task.max_memory,
        "progress": False,
    }
    done = Reading()
    with AutoModel.from_pretrained(form.path, **options) as model:
        for window in task.windows[: task.fast_windows] if is_fast else task.windows:
            done.logits.append(_logits(model, window, is_fast))
        for start in range(0, 0 if is_fast else len(task.prompts), FEW):
            done.answers += _answers(model, task.prompts[start : start + FEW], task.new_tokens)
    return done


def _logits(model: Any, window: torch.Tensor, is_fast: bool) -> torch.Tensor:
    """Of all positions. Fast kernels get few tokens at a time, as when text is generated: more are not theirs."""
    cache, name = DynamicCache(config=model.config), cache_keyword(model)
    few = torch.split(window, FEW if is_fast else len(window))
    return torch.cat([model(ids[None], **{name: cache}).logits[0] for ids in few])


def _answers(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """The likeliest tokens after each, side by side, padded on the left. What has ended is padded on the right."""
    end = model.generation_config.eos_token_id
    pad = end[0] if isinstance(end, list) else end or 0
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
    return [row[longest:].tolist() for row in out]


def compare(form: Reading, reference: Reading, windows: torch.Tensor) -> dict[str, list[float]]:
    """What tells `form` from `reference`, in lists with a number for each window, and for each answer.

    `cross_entropy`, in nats, is that of the text's next tokens. `divergence`, in nats too, is the Kullback-Leibler
    divergence of the distribution of the next token from that of the reference, the mean of all positions. `agreement`
    is the share of positions with the same likeliest token. `equal_tokens` are the first ones of an answer that agree.
    Only what `form` has done is compared.
    """
    found: dict[str, list[float]] = {"cross_entropy": [], "divergence": [], "agreement": []}
    for ids, own, its in zip(windows, form.logits, reference.logits, strict=False):
        log_own, log_its = own.float().log_softmax(-1), its.float().log_softmax(-1)
        found["cross_entropy"].append(cross_entropy(log_own[:-1], ids[1:]).item())
        divergence = (log_its.exp() * (log_its - log_own)).sum(-1, dtype=torch.float64)
        found["divergence"].append(divergence.mean().item())
        found["agreement"].append((own.argmax(-1) == its.argmax(-1)).double().mean().item())
    found["equal_tokens"] = [float(_equal(*pair)) for pair in zip(form.answers, reference.answers, strict=False)]
    return found


def _equal(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = list(zip(first, second, strict=False))
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
