"""This has what the commands that generate text share: a model, a prompt, text on the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from airstream.auto import load_model
from airstream.cli.notes import note
from airstream.cli.options import load_options
from airstream.cli.screen import Printer
from airstream.compat.config_names import num_positions
from airstream.errors import UnsupportedError
from airstream.loading.options import LoadOptions
from airstream.profiling.live import LiveLine
from airstream.reporting.status import showing, status
from airstream.reporting.units import counted


def load(arguments: argparse.Namespace, **options: Any) -> Any:
    """The model that `arguments` name. `printing` shows how it generates, so the model itself does not."""
    check = partial(_check_generates, Path(arguments.model).absolute().name)
    model = load_model(arguments.model, LoadOptions(**load_options(arguments), **options), check=check)
    try:
        with status("loading the tokenizer"):
            model.tokenizer  # noqa: B018 - a checkpoint without one is refused before anybody has typed anything
    except BaseException:
        model.close()
        raise
    return model


def _check_generates(name: str, model: Any) -> None:
    """Raise for a model that has nothing to do with prompts, before its weights are read."""
    if not model.can_generate():
        raise UnsupportedError(
            f"{name} is a {type(model).__name__}, which generates no text: from Python, "
            "AutoModel.from_pretrained(...)(**inputs) gives what it computes"
        )


def tell_beyond(model: Any, num_tokens: int) -> None:
    """Say so where a prompt and its answer took more tokens than the model was made for: it goes on, and gets worse."""
    positions = num_positions(model.config)
    if num_tokens > positions > 0:
        made_for = f"the model was made for {counted(positions, 'token')}"
        note(f"({made_for}: prompt and answer took {counted(num_tokens, 'token')}, and the last may make no sense)")


@contextmanager
def printing(
    model: Any, stops: Sequence[str] = (), max_tokens: int | None = None, is_quiet: bool = False
) -> Iterator[Printer | None]:
    """What prints tokens as they come, if anything does, and on a terminal a line about how fast that is."""
    engine = model._engine
    live = LiveLine(engine.observer, engine.stats, max_tokens=max_tokens)
    with live.following(), showing(live.text) as line:
        yield None if is_quiet else Printer(model.tokenizer, stops, line)
