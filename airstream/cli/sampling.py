"""This says how the next token is chosen: by the command line or by the checkpoint, and which one counts."""

from __future__ import annotations

import argparse
import secrets
from typing import Any, NamedTuple

import torch

from airstream.cli.mistakes import FOR_SAMPLING, drawn_by, is_greedy

EVER = "repetition_penalty"

CHUNK = "prefill_chunk_size"

USUAL_TOP_K = 50
"""What transformers takes if nobody says: said here, so that it can be told."""


class Choice(NamedTuple):
    """The arguments of `generate`, and the same in words."""

    options: dict[str, Any]
    words: str


def choose(arguments: argparse.Namespace, checkpoint: Any, samples_by_default: bool) -> Choice:
    """Seed torch, and give what `arguments` ask for; what they leave open is as the `checkpoint`'s config suggests.

    Args:
        samples_by_default: do as the checkpoint suggests; else the most likely token is taken unless asked otherwise.
    """
    given = drawn_by(arguments)
    suggested = bool(getattr(checkpoint, "do_sample", False))
    samples = not is_greedy(arguments) and bool(given or arguments.sample or (samples_by_default and suggested))
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": samples, "num_beams": 1}
    options |= {"num_return_sequences": 1}  # text is printed as it comes, which is one text
    if samples:
        unsaid = {"top_k": USUAL_TOP_K} if getattr(checkpoint, "top_k", None) is None else {}
        options |= unsaid | given
    options |= {name: value for name in (EVER, CHUNK) if (value := getattr(arguments, name)) is not None}
    seed = secrets.randbits(31) if arguments.seed is None else arguments.seed  # one that can be named
    torch.manual_seed(seed)
    return Choice(options, _describe(options, checkpoint, samples, seed))


def _describe(options: dict[str, Any], checkpoint: Any, samples: bool, seed: int) -> str:
    """`"sampling, temperature 0.6, top p 0.9, seed 17"`."""
    names = (*FOR_SAMPLING, EVER) if samples else (EVER,)
    values = ((name, options.get(name, getattr(checkpoint, name, None))) for name in names)
    parts = [f"{name.replace('_', ' ')} {value:g}" for name, value in values if value is not None]
    parts += [f"seed {seed}"] if samples else []
    return ", ".join(["sampling" if samples else "greedy", *parts])
