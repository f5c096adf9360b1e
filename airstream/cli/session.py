"""What the commands that generate text share: quiet libraries, a model, a prompt, text on the terminal."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TextStreamer
from transformers import logging as transformers_logging

from airstream import AutoModel
from airstream.cli.parser import load_options
from airstream.cli.screen import StatusPrinter, can_show_status
from airstream.errors import UnsupportedError
from airstream.live import LiveLine


def load(arguments: argparse.Namespace, **options: Any) -> Any:
    """The model that `arguments` name, and nothing on the terminal but what is asked for."""
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    if getattr(arguments, "seed", None) is not None:
        torch.manual_seed(arguments.seed)
    return AutoModel.from_pretrained(arguments.model, **load_options(arguments), **options)


def encode(model: Any, prompt: str) -> dict[str, Any]:
    """`prompt` as the model's inputs: token ids of shape (1, length) and their mask, on the model's device."""
    return dict(model.tokenizer(prompt, return_tensors="pt").to(model.device))


def encode_chat(model: Any, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
    """`messages` in the model's chat template, as `encode`."""
    if not model.tokenizer.chat_template:
        raise UnsupportedError("this model has no chat template: use `airstream generate` with a plain prompt")
    inputs = model.tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return dict(inputs.to(model.device))


def printer(model: Any) -> TextStreamer:
    """Prints tokens to standard output as they come, without the prompt."""
    return TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def printing(model: Any, is_quiet: bool = False) -> Iterator[Any]:
    """What prints tokens as they come, with a line below about how fast that is where a terminal can show one."""
    if is_quiet or not can_show_status():
        yield None if is_quiet else printer(model)
        return
    printer_with_status = StatusPrinter(model.tokenizer)
    engine = model._engine
    with LiveLine(engine.observer, engine.stats, lambda _, text: printer_with_status.show(text)).following():
        yield printer_with_status


def note(text: str) -> None:
    """Tell the user something that is not part of the output."""
    print(text, file=sys.stderr)
