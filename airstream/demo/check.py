"""Whether an answer is the one that transformers gives, by letting transformers give it: all weights in memory."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import torch
import transformers

from airstream.hardware import available_host_bytes
from airstream.units import GIB

NEEDED_BYTES = 3 * GIB // 2
"""What transformers takes to read the demo's file and to hold its weights twice for a while, with room to spare."""


def has_room() -> bool:
    """Whether there is memory for the comparison now."""
    return available_host_bytes() >= NEEDED_BYTES


def answer_of_transformers(file: Path, prompt_ids: torch.Tensor, max_new_tokens: int) -> list[int]:
    """What transformers generates after `prompt_ids` with the weights in a GGUF `file`: the new tokens, on the CPU.

    Blocks for about ten seconds; takes 0.9 GiB. Its bars go nowhere.
    """
    options = {"gguf_file": file.name, "dtype": torch.bfloat16}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), warnings.catch_warnings():  # noqa: PTH123
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    output = model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    return output[0, prompt_ids.shape[1] :].tolist()
