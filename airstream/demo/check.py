"""This checks that an answer is the one that transformers gives, by letting it answer with all weights in memory.

The weights come from the same GGUF file by another road than those that were streamed: the package gguf decodes them,
and nothing that streams has a hand in it. transformers' own reading of the file gives the same weights to the bit, and
takes about twice as long.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import torch
import transformers

from airstream.demo.unpack import dense_model
from airstream.reporting.units import GIB
from airstream.system.memory import available_host_bytes

NEEDED_BYTES = 3 * GIB // 2
"""What it takes to decode the demo's file, and for transformers to hold its weights, with room to spare."""


def has_room() -> bool:
    """Whether there is memory for the comparison now."""
    return available_host_bytes() >= NEEDED_BYTES


def answer_of_transformers(file: Path, prompt_ids: torch.Tensor, max_new_tokens: int) -> list[int]:
    """What transformers generates after `prompt_ids` with the weights in a GGUF `file`: the new tokens, on the CPU.

    Blocks for as long as the answer did that is checked, and some seconds more; takes 0.9 GiB. Its bars go nowhere.
    """
    model = resident_model(file)
    output = model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    return output[0, prompt_ids.shape[1] :].tolist()


def resident_model(file: Path) -> transformers.PreTrainedModel:
    """transformers' model of the llama in a GGUF `file`, all weights in memory, in bf16 on the CPU."""
    config, weights = dense_model(file)
    known = transformers.LlamaConfig(**config)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), warnings.catch_warnings():  # noqa: PTH123
        warnings.simplefilter("ignore")
        return transformers.LlamaForCausalLM.from_pretrained(
            None, config=known, state_dict=weights, dtype=torch.bfloat16
        )
