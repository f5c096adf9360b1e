r"""All comparisons, one after the other: workloads by name, each with its table, its JSON and its chart.

    python -m benchmarks.suite --data FOLDER --out docs/benchmarks [--cases w6-3000mib,w6-5500mib] [--turns 5]

Writes the checkpoints that are missing, makes environments and conversions (in FOLDER), and runs every case as
`benchmarks.suite.compare` does: each system in a process of its own, with a cold page cache, under the case's memory
limit, in turns. For each case it writes NAME.json, NAME.md and NAME.png; what is there already is measured again only
if the case is named. The cases `scale-*` together give scale.png: s/token and peak memory over the size of the model.
Needs root, and hours: `--list` says what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import limited
from benchmarks.charts import check_matplotlib
from benchmarks.launch import say
from benchmarks.settings import Settings, absolute, known_names
from benchmarks.suite import compare, plot
from benchmarks.systems import SYSTEMS

W6, SEVEN_B = "3072,8192,28,32000,24,8", "4096,11008,32,32000,32,32"
SMOLLM2 = "SmolLM2-135M-Instruct"
"""A real model, from `airstream demo`; all other workloads are random weights of a shape."""

PEERS = ("airstream", "airllm", "accelerate", "llamacpp")

PACKED = (
    "airstream",
    "airstream-lossless",
    "airstream-int8",
    "airstream-int4",
    "llamacpp-q8_0",
    "llamacpp-q4_k_m",
    "airllm-4bit",
    "accelerate-4bit",
)
"""Fewer bytes. Each has its own numbers, so that no tokens are the same but those of lossless blocks."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Attributes:
        model: a shape of `benchmarks.checkpoints`, or the name of a real model.
        limit_mib: of memory, the page cache included; None: no limit.
        budget_mib: told to systems that take one; None: they choose.
        prompt_tokens, num_tokens, batch_size: of each sequence, and how many of them.
    """

    title: str
    model: str = W6
    limit_mib: int | None
    budget_mib: int | None = None
    prompt_tokens: int = 32
    num_tokens: int = 8
    batch_size: int = 1
    systems: tuple[str, ...] = PEERS

    def settings(self, data: Path, turns: int, timeout_seconds: float) -> Settings:
        """What `benchmarks.suite.compare` is asked."""
        folder = "".join(character if character.isalnum() else "-" for character in self.model)
        return Settings(
            checkpoint=data / "models" / folder,
            shape=self.model,
            work=data / "work",
            venvs=data / "venvs",
            out=None,
            turns=turns,
            timeout_seconds=timeout_seconds,
            prompt=list(range(10, 10 + self.prompt_tokens)),
            num_tokens=self.num_tokens,
            batch_size=self.batch_size,
            systems=[SYSTEMS[name] for name in self.systems],
            limit_mib=self.limit_mib,
            budget_mib=self.budget_mib,
        )


CASES: dict[str, Case] = {
    "w6-3000mib": Case(title="6 GB model in 3,000 MiB", limit_mib=3000),
    "w6-5500mib": Case(title="6 GB model in 5,500 MiB", limit_mib=5500),
    "w6-unlimited": Case(
        title="6 GB model, memory for all of it", limit_mib=None, num_tokens=16, systems=("airstream", "transformers")
    ),
    "w6-batch16": Case(title="6 GB model in 3,000 MiB, 16 sequences", limit_mib=3000, batch_size=16),
    "w6-prompt512": Case(title="6 GB model in 3,000 MiB, prompt of 512 tokens", limit_mib=3000, prompt_tokens=512),
    # Python and torch leave 130 MiB of 400, and "auto" is careful with them: the budget counts a tokenizer of 47 MiB.
    "smollm2-400mib": Case(
        title="SmolLM2-135M in 400 MiB", model=SMOLLM2, limit_mib=400, budget_mib=150, num_tokens=16
    ),
    "smollm2-unlimited": Case(
        title="SmolLM2-135M, memory for all of it",
        model=SMOLLM2,
        limit_mib=None,
        num_tokens=16,
        systems=(*PEERS, "transformers"),
    ),
    "w6-3000mib-packed": Case(title="6 GB model, packed, in 3,000 MiB", limit_mib=3000, systems=PACKED),
    "w6-1500mib-packed": Case(title="6 GB model, packed, in 1,500 MiB", limit_mib=1500, systems=PACKED),
    "7b-3000mib": Case(title="7B shape, 13.5 GB, in 3,000 MiB", model=SEVEN_B, limit_mib=3000),
} | {
    f"scale-{name}": Case(
        title=f"{name.upper()} of weights in 2,000 MiB", model=shape, limit_mib=2000, systems=("airstream",)
    )
    for name, shape in {
        "1gb": "2048,5632,8,32000,16,8",
        "3gb": "3072,8192,13,32000,24,8",
        "6gb": W6,
        "13gb": SEVEN_B,
    }.items()
}


def run_case(name: str, case: Case, arguments: argparse.Namespace) -> None:
    """Measure one case and write its files.

    Raises:
        LimitError: memory cannot be limited here, or the page cache not be dropped.
    """
    settings = case.settings(arguments.data, arguments.turns, arguments.timeout)
    if case.model == SMOLLM2 and not settings.checkpoint.exists():
        raise FileNotFoundError(
            f"{settings.checkpoint} is missing: run `airstream demo`, and copy or link the model's folder "
            f"from airstream's cache folder to it"
        )
    say(f"=== {name}: {case.title}")
    results, table = compare.compare(settings)
    results = {"case": name, "title": case.title} | results
    out: Path = arguments.out
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"{name}.md").write_text(f"# {case.title}\n\n{table}")
    plot.draw_case(results, out / f"{name}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases asked for; returns 1 where that cannot be."""
    arguments = _parse(argv)
    if arguments.list:
        for name, case in CASES.items():
            print(f"{name:<20}{case.title}: {', '.join(case.systems)}")
        return 0
    try:
        check_matplotlib()
        for name in arguments.cases:
            run_case(name, CASES[name], arguments)
    except (limited.LimitError, FileNotFoundError, ImportError) as error:
        say(f"suite: {error}")
        return 1
    scale = sorted(arguments.out.glob("scale-*.json"))
    if len(scale) > 1:
        plot.draw_scale([json.loads(file.read_text()) for file in scale], arguments.out / "scale.png")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.suite", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", type=absolute, default=Path("bench").absolute(), help="a folder for all that is big (default: bench)")
    add(
        "--out",
        type=absolute,
        default=Path("docs/benchmarks").absolute(),
        help="for results (default: docs/benchmarks)",
    )
    add(
        "--cases",
        type=partial(known_names, known=CASES),
        default=list(CASES),
        help="some of them, by name (default: all)",
    )
    add("--turns", type=int, default=5, help="runs of every system (default: %(default)s)")
    add("--timeout", type=float, default=1800.0, help="of a run (default: %(default)s s)")
    add("--list", action="store_true", help="say what cases there are, and end")
    return parser.parse_args(argv)


if __name__ == "__main__":
    limited.end_when_asked()
    sys.exit(main())
