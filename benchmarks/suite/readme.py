"""Keep the README's tables of speeds equal to the measured JSON.

    python -m benchmarks.suite.readme [--check]

Between `<!-- speeds: NAME -->` and `<!-- end of speeds -->` stands the table of docs/benchmarks/NAME.json; between
`<!-- speeds: A, B, C -->` and the same end, one line for each of several. Without `--check` they are written anew; with
it, a difference is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT

README, RESULTS = ROOT / "README.md", ROOT / "docs" / "benchmarks"
MARKED = re.compile(r"(<!-- speeds: ([\w, -]+) -->\n).*?(<!-- end of speeds -->)", re.DOTALL)

NAMES = {
    "airstream": "**airstream**",
    "airllm": "AirLLM {version}",
    "accelerate": "transformers + accelerate {version}, disk offload",
    "accelerate-auto": 'transformers + accelerate {version}, `device_map="auto"`',
    "llamacpp": "llama.cpp (llama-cpp-python {version}), mmap",
    "transformers": "transformers {version}, all in memory",
}
VERSIONS = {
    "airllm": "airllm",
    "accelerate": "accelerate",
    "accelerate-auto": "accelerate",
    "llamacpp": "llama_cpp_python",
    "transformers": "transformers",
}
"""The package whose version is in a name."""

HEADER = (
    "| | s/token after the first | s/token, the first included | seconds to first token | own copy on disk "
    "| tokens as transformers |"
)


def table(results: Mapping[str, Any]) -> str:
    """The README's table of what `benchmarks.suite.compare` measured. Best figures in bold."""
    medians = results["medians"]
    columns = ("decode_seconds_per_token", "seconds_per_token", "ttft_seconds")
    best = {column: min(spreads[column]["median"] for spreads in medians.values()) for column in columns}
    lines = [HEADER, "|---|---|---|---|---|---|"]
    for system in dict.fromkeys(run["system"] for run in results["runs"]):
        name = NAMES[system].format(version=_version(results, system))
        if system not in medians:
            lines.append(f"| {name} | failed | | | | |")
            continue
        cells = [_cell(medians[system][column]["median"], best[column], column) for column in columns]
        copy = medians[system]["prepare_disk_gb"]["median"]
        cells += [f"{copy:.2f} GB" if copy else "none", results["tokens_equal"][system]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


SHORT_NAMES = {
    "airstream": "**airstream**",
    "airllm": "AirLLM",
    "accelerate": "accelerate",
    "llamacpp": "llama.cpp",
    "transformers": "transformers",
}
FAILURES = {"killed": "out of memory", "timed out": "too slow", "one sequence at a time": "one at a time"}
"""What an error has in it, and what a table says of it."""


def overview(several: Sequence[Mapping[str, Any]]) -> str:
    """One line for each comparison: seconds per token of every system, the first token included. Best ones in bold.

    Raises:
        ValueError: they are of different machines.
    """
    machines = {(results["machine"]["cpu"], results["machine"]["cores"]) for results in several}
    if len(machines) > 1:
        raise ValueError(f"comparisons of different machines in one table: {sorted(machines)}")
    lines = [f"| | {' | '.join(SHORT_NAMES.values())} | turns |", "|---" * (len(SHORT_NAMES) + 2) + "|"]
    for results in several:
        medians = {system: spreads["seconds_per_token"]["median"] for system, spreads in results["medians"].items()}
        cells = [
            _cell(medians[system], min(medians.values()), "seconds_per_token")
            if system in medians
            else _failure(results, system)
            for system in SHORT_NAMES
        ]
        lines.append(f"| {results['title']} | {' | '.join(cells)} | {results['turns']} |")
    return "\n".join(lines) + "\n"


def _failure(results: Mapping[str, Any], system: str) -> str:
    """Why `system` has no figure, in two or three words; empty where it did not take part."""
    errors = [run["error"] for run in results["runs"] if run["system"] == system]
    if not errors:
        return ""
    return next((said for found, said in FAILURES.items() if found in errors[0]), "failed")


def _cell(value: float, best: float, column: str) -> str:
    text = f"{value:.1f}" if column == "ttft_seconds" else f"{value:.2f}"
    return f"**{text}**" if value == best else text


def _version(results: Mapping[str, Any], system: str) -> str:
    """The version of `system` that ran, as its records have it."""
    records = [run["record"] for run in results["runs"] if run["system"] == system and run["record"]]
    packages = dict(part.split(" ") for record in records[:1] for part in record["version"].split(", "))
    return packages.get(VERSIONS.get(system, ""), "?")


def updated(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked table made from its JSON."""

    def replace(match: re.Match[str]) -> str:
        measured = [json.loads((results / f"{name}.json").read_text()) for name in match[2].split(", ")]
        return match[1] + (table(measured[0]) if len(measured) == 1 else overview(measured)) + match[3]

    return MARKED.sub(replace, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or compare them; returns 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    is_check = parser.parse_args(argv).check
    text = README.read_text()
    new = updated(text)
    if is_check and new != text:
        print("README.md differs from docs/benchmarks: run `python -m benchmarks.suite.readme`", file=sys.stderr)
        return 1
    if not is_check:
        README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
