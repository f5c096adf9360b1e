"""The parser has the arguments of every command. Importing this is cheap: commands import torch when they run."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from airstream.cli import mistakes, values
from airstream.cli.slips import meant_instead
from airstream.cli.starting import starting
from airstream.cli.values import number
from airstream.codecs.names import CODEC_NAMES
from airstream.reporting.status import can_draw

Command = Callable[[argparse.Namespace], int | None]
"""Returns the exit status, if it is not 0."""


COUNT = number(int, at_least=1)

MAX_SEED = (1 << 63) - 1
SCALE = number(float, at_least=1e-6, at_most=1_000_000)
"""What logits can be divided by, and multiplied with: they stay numbers in float32."""

TEMPERATURE = number(float, at_least=1e-6, at_most=1_000_000, or_zero=True)
NAMED_SIZE = re.compile(r"[\w:]+=[\w.]+")

DEVICE = "device that computes (default: the accelerator if there is one, else cpu)"


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        meant = meant_instead(message, self.format_usage())
        self.exit(2, f"{self.prog}: {message}{meant} (`{self.prog} --help` says more)\n")


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
    parser = Parser(
        prog="airstream", description="Run language models bigger than memory by streaming their layers from disk."
    )
    parser.add_argument("--version", action="version", version=f"airstream {version}")
    parser.add_argument("--traceback", action="store_true", help="after an unexpected error, show where it was raised")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)

    _add_demo(commands)
    _add_generate(commands)
    _add_chat(commands)

    plan = commands.add_parser("plan", help="what would be resident, what streamed, the predicted peak and seconds")
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
    _add_machine(plan)
    _add_loading(plan)
    plan.set_defaults(run=_command("plan", mistakes.check_plan))

    hardware = commands.add_parser("hardware", help="what this machine's disk, memory and processors can do")
    hardware.add_argument("path", nargs="?", default=".", help="a folder on the disk to measure (default: this one)")
    hardware.add_argument("--device", type=values.device, help=DEVICE)
    hardware.add_argument("--refresh", action="store_true", help="measure again, whatever is known already")
    hardware.add_argument("--json", action="store_true", help="print the rates as JSON")
    hardware.set_defaults(run=_command("hardware"))

    _add_files(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="a small real model answers a question in less memory than it has weights")
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
    generate = commands.add_parser("generate", help="continue a prompt; the text appears as it is generated")
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
    _add_generation(generate, "the most likely token is taken, unless an option below asks for sampling")
    _add_loading(generate)
    generate.set_defaults(run=_command("generate", mistakes.check_generate))


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser("chat", help="talk to a model; /help lists what else can be typed")
    chat.add_argument("model", help="folder or hub id of a checkpoint with a chat template")
    chat.add_argument("--system", type=values.words, metavar="TEXT", help="a system message to begin with")
    chat.add_argument(
        "--no-reuse",
        action="store_true",
        help="read the whole conversation again for every answer, as `generate` does",
    )
    _add_generation(chat, "sampling as the checkpoint's generation_config.json says, unless an option below differs")
    _add_loading(chat)
    chat.set_defaults(run=_command("chat", mistakes.check_chat))


def _add_files(commands: Any) -> None:
    repack = commands.add_parser("repack", help="write a checkpoint anew, each layer in one piece; or some layers only")
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
    _add_source(repack.add_argument_group("source (as in AutoModel.from_pretrained)"))
    repack.set_defaults(run=_command("repack", mistakes.check_repack))

    verify = commands.add_parser("verify", help="prove a checkpoint complete and uncorrupted, or name what is not")
    verify.add_argument("model", help="folder or hub id of a checkpoint, or a .gguf file")
    verify.add_argument("--deep", action="store_true", help="look for NaN and infinite values too")
    verify.add_argument("--quick", action="store_true", help="names, shapes and sizes only: read no weights")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    _add_source(verify.add_argument_group("source (as in AutoModel.from_pretrained)"))
    verify.set_defaults(run=_command("verify", mistakes.check_verify))


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("another machine (what is not given is as here)")
    group.add_argument("--gpu", metavar="CARD", help='"RTX 3090", which need not be here; "3090,4090" with --table')
    group.add_argument("--ram", type=values.size, metavar="SIZE", help="all memory of the host: 64GiB")
    group.add_argument(
        "--disk-gbps", type=number(float, above=0), metavar="GB/S", help="of the disk that the checkpoint lies on"
    )


def _add_loading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loading (as in AutoModel.from_pretrained)")
    group.add_argument(
        "--max-memory",
        action="append",
        type=values.memory,
        metavar="SIZE",
        help="4GiB, or 0=4GiB cpu=8GiB; default: most of it",
    )
    group.add_argument("--device", type=values.device, help=DEVICE)
    group.add_argument("--dtype", type=values.dtype, help='of the weights (default: "auto", the checkpoint\'s own)')
    group.add_argument(
        "--max-context", "--context", type=COUNT, metavar="TOKENS", help="tokens per sequence to plan for"
    )
    group.add_argument(
        "--max-batch-size", "--batch", type=COUNT, metavar="N", help="sequences to plan for (default: 1)"
    )
    group.add_argument(
        "--layers-per-batch", type=number(int, at_least=1, word="auto"), metavar="N", help="layers moved as one unit"
    )
    group.add_argument(
        "--prefetch-batches",
        type=number(int, at_least=0, word="auto"),
        metavar="N",
        help="layer batches read ahead; 0: none",
    )
    group.add_argument(
        "--page-cache", action=argparse.BooleanOptionalAction, help="read through the page cache (default: if it fits)"
    )
    group.add_argument("--attn-implementation", help="as in transformers")
    group.add_argument(
        "--compression", "--codec", type=values.codec, metavar="CODEC", help="repack so, into the cache folder, once"
    )
    group.add_argument(
        "--kernels", choices=("exact", "fast"), help="fast: multiply packed weights as they are, rounding otherwise"
    )
    _add_source(group)


def _add_source(group: Any) -> None:
    group.add_argument("--gguf-file", metavar="FILE", help="the GGUF file to use, of a folder or hub repository")
    group.add_argument("--subfolder", metavar="FOLDER", help="of the folder or repository, where the checkpoint lies")
    group.add_argument("--variant", help="of the weights: fp16 names model.fp16.safetensors")
    group.add_argument("--revision", help="of the hub repository")
    group.add_argument("--token", help="of the hub")
    group.add_argument("--cache-dir", help="of the hub")
    group.add_argument("--local-files-only", action="store_true", default=None, help="do not use the network")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run code from the checkpoint")


def _add_generation(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group("generation", f"By default: {default}.")
    group.add_argument("--max-new-tokens", type=COUNT, default=256, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--prefill-chunk-size", type=COUNT, metavar="TOKENS", help="read the prompt in pieces, which takes less memory"
    )
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--greedy", action="store_true", help="take the most likely token")
    choice.add_argument("--sample", action="store_true", help="sample as the checkpoint says")
    group.add_argument("--temperature", type=TEMPERATURE, metavar="T", help="sample; 0 takes the most likely token")
    group.add_argument(
        "--top-p", type=number(float, above=0, at_most=1), metavar="P", help="sample the most likely that make up P"
    )
    group.add_argument("--top-k", type=number(int, at_least=0), metavar="K", help="sample the K most likely; 0: all")
    group.add_argument(
        "--min-p",
        type=number(float, at_least=0, at_most=1),
        metavar="P",
        help="those at least P times the likeliest",
    )
    group.add_argument("--repetition-penalty", type=SCALE, metavar="R", help="above 1: what was there is less likely")
    group.add_argument(
        "--stop", action="append", type=values.text, metavar="TEXT", help="end before this text; or one of several"
    )
    group.add_argument("--seed", type=number(int, at_least=0, at_most=MAX_SEED), metavar="N", help="of sampling")


def _command(name: str, check: Callable[[argparse.Namespace], None] | None = None) -> Command:
    """What runs the module of that name, once `check` has found nothing wrong."""

    def run(arguments: argparse.Namespace) -> int | None:
        if check is not None:
            check(arguments)
        if name == "demo" and not can_draw():  # a newcomer's first command should never be silent
            print("airstream: starting: importing torch and transformers", file=sys.stderr, flush=True)
        with starting():
            module = importlib.import_module(f"airstream.cli.{name}")
        exit_status: int | None = module.run(arguments)
        return exit_status

    return run
