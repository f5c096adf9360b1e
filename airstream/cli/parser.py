"""The parser has the arguments of every command. Importing this is cheap: commands import torch when they run."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

from airstream.cli import mistakes, values
from airstream.cli.groups import DEVICE, add_generation, add_loading, add_machine, add_source
from airstream.cli.slips import meant_instead
from airstream.cli.starting import starting
from airstream.cli.values import number
from airstream.codecs.names import CODEC_NAMES
from airstream.reporting.status import can_draw

Command = Callable[[argparse.Namespace], int | None]
"""Returns the exit status, if it is not 0."""


COMMANDS: Mapping[str, str] = {
    "demo": "a small real model answers, in less memory than it has weights",
    "generate": "continue a prompt; the text appears as it is generated",
    "chat": "talk to a model; /help lists what else can be typed",
    "plan": "what would stay in memory, what stream; peak and seconds",
    "hardware": "what this machine's disk, memory and processors can do",
    "repack": "write a checkpoint anew, layer by layer; packed, or a part",
    "cache": "list the packed copies that compression keeps, or clear them",
    "verify": "prove a checkpoint complete and uncorrupted, or say what is not",
}
"""What each command does, in the line that it has in a list of 80 columns."""

COMMAND = "COMMAND"

NAMED_SIZE = re.compile(r"[\w:]+=[\w.]+")


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        meant = meant_instead(message, self.format_usage())
        self.exit(2, f"{self.prog}: {message}{meant} (`{self.prog} --help` says more)\n")


class ProgramParser(Parser):
    """Of the program itself. Who names no command is shown which there are."""

    def error(self, message: str) -> NoReturn:
        if message.endswith(f": {COMMAND}"):  # that it is missing
            print("\n".join(("Commands:", *(f"  {name:<10}{what}" for name, what in COMMANDS.items()), "")))
        super().error(message)


class CommandParser(Parser):
    """Of one command: its arguments may stand before, between and behind its options."""

    _is_mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse has it, but arguments and options may be mixed."""
        if self._is_mixing or args is None:
            return super().parse_known_args(args, namespace)
        self._is_mixing = True  # what mixes comes here again, for options and for the others
        try:
            parsed, left = self.parse_known_intermixed_args(_one_by_one(args), namespace)
        finally:
            self._is_mixing = False
        if left:  # told here, where it is known whose options there are
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return parsed, left


def _one_by_one(args: Sequence[str]) -> list[str]:
    """`--max-memory 0=4GiB cpu=8GiB MODEL` as an option before each size, so that it takes nothing else."""
    spread: list[str] = []
    is_size = False
    for before, arg in zip(("", *args), args, strict=False):
        is_size = before == "--max-memory" or (is_size and NAMED_SIZE.fullmatch(arg) is not None)
        spread += ["--max-memory", arg] if is_size and before != "--max-memory" else [arg]
    return spread


def build_parser(version: str) -> argparse.ArgumentParser:
    """The parser of this `version`; what it returns has `run`, the command to call with it."""
    parser = ProgramParser(
        prog="airstream", description="Run language models bigger than memory by streaming their layers from disk."
    )
    parser.add_argument("--version", action="version", version=f"airstream {version}")
    parser.add_argument("--traceback", action="store_true", help="after an unexpected error, show where it was raised")
    commands = parser.add_subparsers(required=True, metavar=COMMAND, parser_class=CommandParser)

    _add_demo(commands)
    _add_generate(commands)
    _add_chat(commands)

    plan = commands.add_parser("plan", help=COMMANDS["plan"])
    plan.add_argument("models", nargs="+", metavar="MODEL", help="folder or hub id; its config is enough")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument(
        "--prompt-tokens",
        type=number(int, at_least=1),
        metavar="N",
        help="of the prompt whose first token is predicted",
    )
    plan.add_argument("--table", action="store_true", help="models x precisions x cards: what fits, what streams")
    plan.add_argument("--format", choices=("text", "markdown", "csv", "json"), help="of the table (default: text)")
    plan.add_argument("--plot", metavar="FILE", help="draw seconds per token over sizes of memory: plan.png")
    add_machine(plan)
    add_loading(plan)
    plan.set_defaults(run=_command("plan", mistakes.check_plan))

    hardware = commands.add_parser("hardware", help=COMMANDS["hardware"])
    hardware.add_argument("path", nargs="?", default=".", help="a folder on the disk to measure (default: this one)")
    hardware.add_argument("--device", type=values.device, help=DEVICE)
    hardware.add_argument("--refresh", action="store_true", help="measure again, whatever is known already")
    hardware.add_argument("--json", action="store_true", help="print the rates as JSON")
    hardware.set_defaults(run=_command("hardware", mistakes.check_hardware))

    _add_files(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help=COMMANDS["demo"])
    demo.add_argument(
        "question", nargs="?", type=values.words, default="What is the capital of Italy, and what is it known for?"
    )
    demo.add_argument(
        "--max-memory",
        type=values.budget,
        default="200MiB",
        metavar="SIZE",
        help="budget of the device that computes (default: %(default)s)",
    )
    demo.add_argument("--device", type=values.device, help=DEVICE)
    demo.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare the answer with that of transformers",
    )
    demo.set_defaults(run=_command("demo"))


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help=COMMANDS["generate"])
    generate.add_argument("model", help="folder or hub id of a checkpoint, or a .gguf file")
    generate.add_argument("prompt", nargs="?", help='the text to continue; "-" reads it from standard input')
    generate.add_argument("--file", "-f", metavar="FILE", help="read the prompt from a file, but for its last line end")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    generate.add_argument(
        "--system", type=values.words, metavar="TEXT", help="with the chat template: a system message before the prompt"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    generate.add_argument("--stats", action="store_true", help="report time, bytes and memory at the end, on stderr")
    generate.add_argument("--profile", action="store_true", help="say at the end where the time went, on stderr")
    generate.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev: run.json")
    generate.add_argument("--plot", metavar="FILE", help="draw where the time went: run.png")
    add_generation(generate, "the most likely token is taken, unless an option below asks for sampling")
    add_loading(generate)
    generate.set_defaults(run=_command("generate", mistakes.check_generate))


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser("chat", help=COMMANDS["chat"])
    chat.add_argument("model", help="folder or hub id of a checkpoint with a chat template")
    chat.add_argument("--system", type=values.words, metavar="TEXT", help="a system message to begin with")
    chat.add_argument(
        "--no-reuse",
        action="store_true",
        help="read the whole conversation again for every answer, as `generate` does",
    )
    add_generation(chat, "sampling as the checkpoint's generation_config.json says, unless an option below differs")
    add_loading(chat)
    chat.set_defaults(run=_command("chat", mistakes.check_chat))


def _add_files(commands: Any) -> None:
    repack = commands.add_parser("repack", help=COMMANDS["repack"])
    repack.add_argument("model", help="folder or hub id of a checkpoint, which is only read")
    repack.add_argument("out", help="folder to write, new or empty; a run that was killed goes on where it was")
    repack.add_argument(
        "--layers", type=values.layers, metavar="5:15", help="only layers 5 to 14, for a machine that runs only these"
    )
    repack.add_argument(
        "--codec",
        type=values.codec,
        metavar="NAME",
        help=f"of the weights: {'; '.join(f'{name} ({what})' for name, what in CODEC_NAMES.items())}",
    )
    repack.add_argument(
        "--shard-size",
        type=values.shard_size,
        default="4GiB",
        metavar="SIZE",
        help="of a file, at most (default: %(default)s)",
    )
    add_source(repack.add_argument_group("source (as in AutoModel.from_pretrained)"))
    repack.set_defaults(run=_command("repack", mistakes.check_repack))

    cache = commands.add_parser("cache", help=COMMANDS["cache"])
    cache.add_argument(
        "--clear",
        nargs="*",
        metavar="NAME",
        help="remove the copies of these names, or of models of these names; all, if none is named",
    )
    cache.add_argument("--json", action="store_true", help="print the list as JSON")
    cache.set_defaults(run=_command("cache", mistakes.check_cache, is_light=True))

    verify = commands.add_parser("verify", help=COMMANDS["verify"])
    verify.add_argument("model", help="folder or hub id of a checkpoint, or a .gguf file")
    verify.add_argument("--deep", action="store_true", help="look for NaN and infinite values too")
    verify.add_argument("--quick", action="store_true", help="names, shapes and sizes only: read no weights")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    add_source(verify.add_argument_group("source (as in AutoModel.from_pretrained)"))
    verify.set_defaults(run=_command("verify", mistakes.check_verify))


def _command(name: str, check: Callable[[argparse.Namespace], None] | None = None, is_light: bool = False) -> Command:
    """What runs the module of that name, once `check` has found nothing wrong. A light one imports no torch."""

    def run(arguments: argparse.Namespace) -> int | None:
        if check is not None:
            check(arguments)
        if name == "demo" and not can_draw():  # a newcomer's first command should never be silent
            print("airstream: starting: importing torch and transformers", file=sys.stderr, flush=True)
        with nullcontext() if is_light else starting():
            module = importlib.import_module(f"airstream.cli.{name}")
        exit_status: int | None = module.run(arguments)
        return exit_status

    return run
