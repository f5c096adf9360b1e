"""What all runners share: the command line, the clock and the record. Standard library only, so it runs in any venv.

A runner is started as `python -m benchmarks.peers.NAME_runner prepare|run ...` and prints its `Record` as JSON on the
last line of standard output. Imports happen before the clock starts: what is compared is loading and generating.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.limited import disk_read_bytes

PREPARED_NAME = "prepared.json"
AUTO = "auto"  # a budget that the system chooses itself


@dataclass(frozen=True)
class Request:
    """What a runner is asked to do."""

    checkpoint: Path
    work: Path  # this system's own folder for what it has to write; kept between runs
    prompt: list[int]
    num_tokens: int
    budget_bytes: int | None  # what a system that takes a memory budget is told; None: it chooses one itself
    batch_size: int = 1  # sequences at once; `prompts` has theirs
    form: str = ""  # what the runner makes of the weights, where it can; as they are, by default

    @property
    def prompts(self) -> list[list[int]]:
        """A prompt for every sequence: the one given, and the same with all ids one higher, two higher..."""
        return [[token + row for token in self.prompt] for row in range(self.batch_size)]

    def arguments(self) -> list[str]:
        """The command line that `parse` turns into this request again."""
        return [
            f"--checkpoint={self.checkpoint}",
            f"--work={self.work}",
            f"--prompt={','.join(map(str, self.prompt))}",
            f"--tokens={self.num_tokens}",
            f"--budget-bytes={AUTO if self.budget_bytes is None else self.budget_bytes}",
            f"--batch={self.batch_size}",
            f"--form={self.form}",
        ]


@dataclass(frozen=True)
class Record:
    """One measured run. Every system fills the same fields."""

    system: str
    version: str
    tokens: list[int]  # of all sequences, one after the other
    load_seconds: float  # the constructor
    ttft_seconds: float  # from the start of the constructor to the first new token
    seconds_per_token: float  # generation over new tokens of a sequence, the first pass included, loading excluded
    decode_seconds_per_token: float  # over the tokens after the first
    peak_rss_bytes: int  # ru_maxrss: file pages mapped into the process count, page cache does not
    read_bytes: int | None  # fetched from the disk while loading and generating
    prepare_seconds: float = 0.0
    prepare_disk_bytes: int = 0
    details: dict[str, Any] = field(default_factory=dict)  # what only this system can say


@dataclass
class TokenClock:
    """The moments at which new tokens came. Also a transformers streamer, which is handed the prompt first."""

    seconds: list[float] = field(default_factory=list)
    has_prompt: bool = False

    def tick(self) -> None:
        """A new token is there."""
        self.seconds.append(time.perf_counter())

    def put(self, value: Any) -> None:  # noqa: ARG002 - transformers' streamer protocol
        """What transformers calls, once for the prompt and then for every token."""
        if self.has_prompt:
            self.tick()
        self.has_prompt = True

    def end(self) -> None:
        """What transformers calls after the last token."""


@dataclass(frozen=True)
class Runner:
    """How one system works. `prepare` is a one-time conversion into `Request.work`, where the system needs one."""

    system: str
    packages: tuple[str, ...]  # distributions whose versions go on record
    load: Callable[[Request], Any]
    generate: Callable[[Any, Request, TokenClock], list[int]]  # must tick the clock at every new token
    prepare: Callable[[Request], None] | None = None
    details: Callable[[Any], dict[str, Any]] | None = None


def main(runner: Runner, argv: Sequence[str] | None = None) -> None:
    """Prepare or run, then print one JSON object on the last line of standard output."""
    action, request = parse(argv)
    result = prepare_once(runner, request) if action == "prepare" else asdict(measure(runner, request))
    print(f"\n{json.dumps(result)}", flush=True)


def parse(argv: Sequence[str] | None = None) -> tuple[str, Request]:
    """The command line as an action and a request."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("prepare", "run"))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompt", type=parse_tokens, required=True, metavar="ID,ID,...")
    parser.add_argument("--tokens", type=int, required=True, dest="num_tokens")
    parser.add_argument("--budget-bytes", type=parse_budget, required=True)
    parser.add_argument("--batch", type=int, default=1, dest="batch_size")
    parser.add_argument("--form", default="")
    fields = vars(parser.parse_args(argv))
    return fields.pop("action"), Request(**fields)


def parse_tokens(text: str) -> list[int]:
    """`"10,11,12"` as token ids."""
    return [int(part) for part in text.split(",")]


def parse_budget(text: str) -> int | None:
    """A number of bytes, or None for `"auto"`."""
    return None if text == AUTO else int(text)


def prepare_once(runner: Runner, request: Request) -> dict[str, float]:
    """Do the one-time conversion unless it is done, and return what it cost when it was done."""
    done = request.work / PREPARED_NAME
    if not done.exists():
        request.work.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        if runner.prepare is not None:
            runner.prepare(request)
        seconds = time.perf_counter() - start
        cost = {"prepare_seconds": seconds, "prepare_disk_bytes": folder_bytes(request.work)}
        partial = done.with_suffix(".partial")
        partial.write_text(json.dumps(cost))
        partial.rename(done)
    costs: dict[str, float] = json.loads(done.read_text())
    return costs


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(runner: Runner, request: Request) -> Record:
    """Load, generate, and write down what it took.

    Raises:
        RuntimeError: the system made another number of tokens, or did not report each of them.
    """
    clock = TokenClock()
    read_before = disk_read_bytes()
    start = time.perf_counter()
    model = runner.load(request)
    loaded = time.perf_counter()
    tokens = runner.generate(model, request, clock)
    end = time.perf_counter()
    read_after = disk_read_bytes()
    steps = request.num_tokens
    if len(clock.seconds) != steps or len(tokens) != request.batch_size * steps:
        counts = f"{len(tokens)} tokens and {len(clock.seconds)} ticks of the clock"
        raise RuntimeError(f"{runner.system} made {counts} where {request.batch_size} x {steps} were asked for")
    prepared = request.work / PREPARED_NAME
    record = Record(
        system=runner.system,
        version=", ".join(f"{package} {version(package)}" for package in runner.packages),
        tokens=tokens,
        load_seconds=loaded - start,
        ttft_seconds=clock.seconds[0] - start,
        seconds_per_token=(end - loaded) / steps,
        decode_seconds_per_token=(clock.seconds[-1] - clock.seconds[0]) / max(steps - 1, 1),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        read_bytes=None if read_before is None or read_after is None else read_after - read_before,
        details={"python": platform.python_version(), "cpus": os.cpu_count()}
        | (runner.details(model) if runner.details else {}),
        **(json.loads(prepared.read_text()) if prepared.exists() else {}),
    )
    if hasattr(model, "close"):  # threads and maps end here, not at some point of the interpreter's exit
        model.close()
    return record


def generate_with_transformers(model: Any, request: Request, clock: TokenClock) -> list[int]:
    """Greedy decoding through transformers' `generate`, end-of-sequence ignored, for every system that has it."""
    import torch  # here, because llama.cpp's environment has none

    prompt = torch.tensor(request.prompts)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.num_tokens,
        min_new_tokens=request.num_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    new_tokens: list[int] = output[:, prompt.shape[1] :].flatten().tolist()
    return new_tokens
