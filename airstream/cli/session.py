"""This has what the commands that generate text share: a model, a prompt, text on the terminal."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from airstream import AutoModel
from airstream.checkpoint.beside import has_tokenizer
from airstream.cli.parser import load_options
from airstream.cli.screen import Printer
from airstream.compat.blame import told
from airstream.errors import ArgumentError, CheckpointNotFoundError, UnsupportedError
from airstream.profiling.live import LiveLine
from airstream.reporting.status import can_draw, showing, status


def load(arguments: argparse.Namespace, **options: Any) -> Any:
    """The model that `arguments` name. `printing` shows how it generates, so the model itself does not."""
    model = AutoModel.from_pretrained(arguments.model, **load_options(arguments), **options)
    try:
        with status("loading the tokenizer"):
            model.tokenizer  # noqa: B018 - a checkpoint without one is refused before anybody has typed anything
    except CheckpointNotFoundError as error:
        model.close()
        raise _without_tokenizer(Path(arguments.model)) or error from error
    except BaseException:
        model.close()
        raise
    return model


def _without_tokenizer(folder: Path) -> CheckpointNotFoundError | None:
    """What to say of a folder in which nothing is of a tokenizer; None if there is, and something else is wrong."""
    if not folder.is_dir() or has_tokenizer(folder):
        return None
    return CheckpointNotFoundError(
        f"{folder} has no tokenizer beside its weights: copy tokenizer.json and tokenizer_config.json into it from "
        "where the model comes from, or save one with tokenizer.save_pretrained(...)"
    )


def encode(model: Any, prompt: str) -> dict[str, Any]:
    """`prompt` as the model's inputs: token ids of shape (1, length) and their mask, on the model's device."""
    inputs = dict(model.tokenizer(prompt, return_tensors="pt").to(model.device))
    if not inputs["input_ids"].numel():
        raise ArgumentError(f"the prompt {prompt!r} has no tokens: give some text to continue")
    return inputs


def check_chat(model: Any) -> None:
    """Raise if there is no way to tell the model who says what."""
    if not model.tokenizer.chat_template:
        raise UnsupportedError("this model has no chat template: use `airstream generate` with a plain prompt")


def encode_chat(model: Any, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
    """`messages` in the model's chat template, as `encode`. Blocks as long as the template likes."""
    check_chat(model)
    try:
        inputs = model.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program that somebody else wrote
        roles = ", ".join(message["role"] for message in messages)
        said = str(error) or told(error)
        raise UnsupportedError(f"the chat template of this model refuses the messages ({roles}): {said}") from error
    return dict(inputs.to(model.device))


@contextmanager
def printing(
    model: Any, stops: Sequence[str] = (), max_tokens: int | None = None, is_quiet: bool = False
) -> Iterator[Printer | None]:
    """What prints tokens as they come, if anything does, and on a terminal a line about how fast that is."""
    engine = model._engine
    live = LiveLine(engine.observer, engine.stats, max_tokens=max_tokens)
    with live.following(), showing(live.text) as line:
        yield None if is_quiet else Printer(model.tokenizer, stops, line)


def program() -> str:
    """What to type for airstream here: its name where a shell finds it, or the file that was called."""
    called = sys.argv[0]
    return "airstream" if shutil.which("airstream") or Path(called).stem != "airstream" else called


def tell(doing: str) -> None:
    """Say what is being done where no line can show it, in a line that stays."""
    if not can_draw():
        note(f"airstream: {doing}")


def note(text: str) -> None:
    """Tell the user something that is not part of the output."""
    print(text, file=sys.stderr, flush=True)
