"""What a comparison is asked to do: the command line, checked and typed. Measures nothing."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from benchmarks.limited import MIB
from benchmarks.peers.measure import AUTO, Request, parse_tokens
from benchmarks.systems import SYSTEMS, System

# Left to the interpreter, its libraries and the page cache when a system is told its budget.
RESERVE_MIB = 500


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every measurement in turns needs to know. Paths are absolute: the runners start in another folder."""

    checkpoint: Path
    shape: str  # of the checkpoint, where it has yet to be written
    work: Path
    venvs: Path
    out: Path | None
    turns: int
    timeout_seconds: float
    prompt: list[int]
    num_tokens: int
    batch_size: int = 1

    @property
    def shards(self) -> list[Path]:
        """The checkpoint's weight files."""
        return sorted(self.checkpoint.glob("*.safetensors"))

    @property
    def weight_bytes(self) -> int:
        """The bytes of the checkpoint's weight files."""
        return sum(file.stat().st_size for file in self.shards)

    @property
    def budget_bytes(self) -> int | None:
        """What a system that takes a memory budget is told; None: it chooses one itself."""
        return None

    def request(self, system: System) -> Request:
        """What `system` is asked. Its folder is keyed by the checkpoint, so another one gets another preparation."""
        return Request(
            checkpoint=self.checkpoint,
            work=self.work / checkpoint_key(self.checkpoint) / system.name,
            prompt=self.prompt,
            num_tokens=self.num_tokens,
            budget_bytes=self.budget_bytes,
            batch_size=self.batch_size,
            form=system.form,
        )


@dataclass(frozen=True, kw_only=True)
class Settings(Setup):
    """What to compare and how."""

    systems: list[System]
    limit_mib: int | None  # None: memory is not limited
    budget_mib: int | None  # None: a system that takes a budget chooses one itself

    @property
    def budget_bytes(self) -> int | None:
        """`budget_mib` in bytes."""
        return None if self.budget_mib is None else self.budget_mib * MIB


def checkpoint_key(checkpoint: Path) -> str:
    """A folder name for what is derived from this checkpoint: changes with its files, their sizes and their times."""
    digest = sha256()
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return f"{checkpoint.name}-{digest.hexdigest()[:8]}"


def parse_systems(text: str) -> list[System]:
    """`"airstream,airllm"` as systems.

    Raises:
        argparse.ArgumentTypeError: one of them is unknown.
    """
    return [SYSTEMS[name] for name in known_names(text, SYSTEMS)]


def known_names(text: str, known: Collection[str]) -> list[str]:
    """`"one,other"` as names, each once.

    Raises:
        argparse.ArgumentTypeError: one of them is not `known`.
    """
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def parse_mib(text: str) -> int | None:
    """A number of MiB; None for `"none"`, `"auto"` and 0.

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    if text in ("none", AUTO):
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number of MiB nor none or {AUTO}")
    return int(text) or None


def add_shared_options(parser: argparse.ArgumentParser, num_tokens: int, needs_folders: bool = True) -> None:
    """The options that become a `Setup`. `num_tokens` is the default of `--tokens`."""
    add = parser.add_argument
    add("--checkpoint", type=absolute, required=True, help="a Llama checkpoint; written where the folder is missing")
    add("--shape", default="3072,8192,28,32000,24,8", help="of a checkpoint to write (default: %(default)s, 6.03 GB)")
    add("--turns", type=int, default=3, help="runs of everything that is measured (default: %(default)s)")
    add("--venvs", type=absolute, required=needs_folders, help="a folder of environments; missing ones are made")
    add(
        "--work",
        type=absolute,
        required=needs_folders,
        help="a folder for what systems write, such as own copies",
    )
    add("--out", type=absolute, help="a file for the JSON")
    add("--timeout", type=float, default=1800.0, dest="timeout_seconds", help="of a run (default: %(default)s s)")
    add("--prompt", type=parse_tokens, default=list(range(10, 42)), help="token ids (default: 10 to 41)")
    add("--tokens", type=int, default=num_tokens, dest="num_tokens", help="new tokens (default: %(default)s)")


def parse_settings(description: str | None, argv: Sequence[str] | None = None) -> Settings:
    """The command line as settings; exits with a message where it makes no sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_shared_options(parser, num_tokens=8)
    add("--limit-mib", type=parse_mib, required=True, help="memory of every run, page cache included; none: no limit")
    budget_help = f"told to systems that take one; auto: they choose (default: the limit less {RESERVE_MIB}, if any)"
    add("--batch", type=int, default=1, dest="batch_size", help="sequences at once (default: %(default)s)")
    add("--budget-mib", type=parse_mib, default=argparse.SUPPRESS, help=budget_help)
    add("--systems", type=parse_systems, default="airstream,airllm,accelerate,llamacpp", help=", ".join(SYSTEMS))
    args = parser.parse_args(argv)
    if "budget_mib" not in args:
        args.budget_mib = None if args.limit_mib is None else args.limit_mib - RESERVE_MIB
    if args.batch_size < 1:
        parser.error(f"a batch of {args.batch_size} sequences is none")
    if args.budget_mib is not None and not 0 < args.budget_mib <= (args.limit_mib or args.budget_mib):
        parser.error(f"a budget of {args.budget_mib} MiB is not within the limit of {args.limit_mib} MiB")
    return Settings(**vars(args))


def absolute(text: str) -> Path:
    """A path that means the same in another folder."""
    return Path(text).absolute()
