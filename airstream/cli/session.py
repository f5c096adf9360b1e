"""This has what the commands that generate text share: a model, a prompt, text on the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from airstream import AutoModel
from airstream.checkpoint.beside import has_tokenizer
from airstream.cli.options import load_options
from airstream.cli.screen import Printer
from airstream.errors import CheckpointNotFoundError
from airstream.profiling.live import LiveLine
from airstream.reporting.status import showing, status


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


@contextmanager
def printing(
    model: Any, stops: Sequence[str] = (), max_tokens: int | None = None, is_quiet: bool = False
) -> Iterator[Printer | None]:
    """What prints tokens as they come, if anything does, and on a terminal a line about how fast that is."""
    engine = model._engine
    live = LiveLine(engine.observer, engine.stats, max_tokens=max_tokens)
    with live.following(), showing(live.text) as line:
        yield None if is_quiet else Printer(model.tokenizer, stops, line)
