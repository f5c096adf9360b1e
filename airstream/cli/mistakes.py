"""This tells what is wrong with a command whatever the model: at once, before torch is imported, which takes seconds.

It knows what the arguments say together, and the files and cards that they name; what one says alone, `values` knows.
It refuses to know models and devices: what only they can tell is told when they are there.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from airstream.cli.here import check_checkpoint, check_config, exists, refuse_empty
from airstream.cli.reading import prompt_of
from airstream.cli.values import parse_memory
from airstream.errors import ArgumentError, CheckpointNotFoundError
from airstream.rates.cards import find_card
from airstream.reporting.alike import meant_path
from airstream.reporting.figure import check_file, new_figure
from airstream.reporting.outputs import check_output
from airstream.reporting.paths import path_of
from airstream.reporting.status import status

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""What a model on a hub may be called; also many a word, and many a folder that is not there yet."""

FOR_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
"""Options that mean something only where tokens are drawn."""


def check_generate(arguments: argparse.Namespace) -> None:
    """Besides, read the prompt, wherever it comes from: it is `arguments.prompt` then."""
    _check_order("generate", arguments.model, arguments.prompt)
    _check_loading(arguments)
    check_sampling(arguments)
    if arguments.trace:
        check_output(path_of("--trace", arguments.trace))
    _check_picture(arguments.plot)
    check_checkpoint(arguments.model, arguments)
    arguments.prompt = prompt_of(arguments.prompt, arguments.file)


def check_chat(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError if the arguments of `airstream chat` cannot go together."""
    _check_loading(arguments)
    check_sampling(arguments)
    check_checkpoint(arguments.model, arguments)


def check_repack(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError if the arguments of `airstream repack` cannot go together."""
    _check_order("repack", arguments.model, arguments.out)
    _check_model(arguments.model)
    if not arguments.out:
        raise ArgumentError("the folder to write has no name: name a new one")
    check_checkpoint(arguments.model, arguments)


def check_verify(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError if the arguments of `airstream verify` cannot go together."""
    _check_model(arguments.model)
    if arguments.deep and arguments.quick:
        raise ArgumentError("--deep reads all weights and --quick reads none: leave one of them out")
    if not arguments.json:
        refuse_empty(arguments.model, arguments)


def check_plan(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError if the arguments of `airstream plan` cannot go together, or name no card that is known."""
    for model in arguments.models:
        _check_model(model)
    _check_memory(arguments)
    _refuse_idle(arguments)
    if not arguments.table and (len(arguments.models) > 1 or "," in (arguments.gpu or "")):
        raise ArgumentError("several models or cards are for --table: add it, or name one")
    for card in arguments.gpu.split(",") if arguments.gpu else ():
        find_card(card)
    if arguments.gpu and arguments.device:
        raise ArgumentError("--device and --gpu both name what computes: leave one of them out")
    if arguments.prompt_tokens and arguments.prompt_tokens > (arguments.max_context or arguments.prompt_tokens):
        raise ArgumentError(
            f"--prompt-tokens {arguments.prompt_tokens} do not fit into --max-context {arguments.max_context}"
        )
    _check_picture(arguments.plot)
    for model in arguments.models:
        check_config(model, arguments)


def check_cache(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError if the arguments of `airstream cache` cannot go together."""
    if arguments.json and arguments.clear is not None:
        raise ArgumentError("--json is of the list, and --clear prints none: leave one of them out")


def check_hardware(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError unless `airstream hardware` has a folder to measure in."""
    folder = Path(arguments.path)
    if folder.is_file():
        raise ArgumentError(f"{folder} is a file: name a folder on the disk to measure")
    if not folder.is_dir():
        raise ArgumentError(f"{folder} is not a folder: name one on the disk that is to be measured")


def _refuse_idle(arguments: argparse.Namespace) -> None:
    """Raise for what would have no effect."""
    if arguments.table:
        kind = "a table"
        idle = {"--plot": arguments.plot, "--json beside --format": arguments.json and arguments.format}
    elif arguments.plot is not None:
        kind = "a picture"
        idle = {"--json": arguments.json, "--format": arguments.format, "--prompt-tokens": arguments.prompt_tokens}
    else:
        kind, idle = "one plan", {"--format": arguments.format}
    for name, given in idle.items():
        if given:
            raise ArgumentError(f"{name} has no effect on {kind}: leave it out")


def drawn_by(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options that say how tokens are drawn, as far as they are given."""
    return {name: value for name in FOR_SAMPLING if (value := getattr(arguments, name)) is not None}


def is_greedy(arguments: argparse.Namespace) -> bool:
    """Whether the most likely token is asked for, in so many words or by the temperature."""
    return bool(arguments.greedy or arguments.temperature == 0)


def check_sampling(arguments: argparse.Namespace) -> None:
    """Raise if one option makes another one meaningless."""
    if not is_greedy(arguments):
        return
    given = drawn_by(arguments)
    idle = [name for name in given if (name, given[name]) != ("temperature", 0)]
    if idle or arguments.sample:
        greedy = "--greedy" if arguments.greedy else "--temperature 0"
        other = f"--{idle[0].replace('_', '-')} {given[idle[0]]}" if idle else "--sample"
        raise ArgumentError(f"{greedy} takes the most likely token, so {other} has no effect: leave one of them out")


def _check_order(command: str, model: str, other: str | None) -> None:
    """Raise if what stands in the model's place can be none, and what stands behind it is one."""
    if other is None or exists(model) or HUB_ID.fullmatch(model):
        return
    if _is_checkpoint(other) or (HUB_ID.fullmatch(other) and "/" in other):
        raise ArgumentError(
            f"{model!r} is no model, and {other!r} looks like one: the model comes first, as in "
            f"`airstream {command} {shlex.join([other, model])}`"
        )


def _is_checkpoint(name: str) -> bool:
    if not exists(name):
        return False
    path = Path(name).expanduser()
    return path.suffix == ".gguf" or (path / "config.json").is_file() or any(path.glob("*.gguf"))


def _check_loading(arguments: argparse.Namespace) -> None:
    _check_model(arguments.model)
    _check_memory(arguments)


def _check_memory(arguments: argparse.Namespace) -> None:
    sizes = parse_memory(arguments.max_memory or [])
    others = [name for name in sizes if name != "cpu"] if isinstance(sizes, dict) else []
    if arguments.device == "cpu" and others:
        raise ArgumentError(f"--max-memory {others[0]}=... is of an accelerator, and --device cpu uses none")


def _check_model(name: str) -> None:
    """Raise for what is plainly a path and leads nowhere. What may be a hub id is left to the hub."""
    if not name:
        raise ArgumentError("the model's name is empty: name a folder or a hub id")
    if name.startswith((".", "/", "~")) and not exists(name):
        kind = "file" if name.endswith(".gguf") else "folder"
        raise CheckpointNotFoundError(f"there is no {kind} {name!r}{meant_path(name)}")


def _check_picture(file: str | None) -> None:
    if file is not None:
        with status("starting: importing matplotlib"):
            check_file(new_figure(), path_of("--plot", file))
