"""Seconds a token of one model in several forms, in turns: `python -m benchmarks.packed FORM [FORM ...]`.

    python -m benchmarks.packed W6:exact W6-lossless:exact W6-lossless:fast W6-int4:fast --max-memory 3000MiB

A form is a checkpoint, the kernels that multiply with it, and, behind an @, a budget of its own. Each run is a process
of its own, which reads around the page cache, and decodes after a prompt of 32 tokens and a pass that warms up. A turn
is a run of each form; a run gives the median of its passes. The link is what `benchmarks.disk` reads of the same files
afterwards. What other programs take of the processors meanwhile is printed beside: a run beside busy ones says little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.disk import read_rate

PROMPT_TOKENS = 32


def busy_seconds() -> float:
    """Processor seconds that all programs together have taken, waiting for disks not included. Linux."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest[:2])) / 100


def measure(folder: str, kernels: str, max_memory: str, tokens: int) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    from airstream import AutoModel

    options: dict[str, Any] = {"max_memory": max_memory, "max_context": 128, "page_cache": False, "kernels": kernels}
    with AutoModel.from_pretrained(folder, device="cpu", progress=False, **options) as model:
        highest = model.config.get_text_config().vocab_size
        ids = torch.randint(3, highest, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
        seconds: list[float] = []
        began = {"wall": 0.0, "own": 0.0, "all": 0.0}

        def note(_: Any, tokens: torch.Tensor) -> torch.Tensor:
            seconds.append(time.perf_counter())
            if len(seconds) == 2:  # the prompt and a pass that warms up are over
                began.update(wall=time.perf_counter(), own=time.process_time(), all=busy_seconds())
            return tokens

        from transformers import LogitsProcessorList

        model.generate(
            ids,
            min_new_tokens=tokens + 2,
            max_new_tokens=tokens + 2,
            do_sample=False,
            logits_processor=LogitsProcessorList([note]),
        )
        others = busy_seconds() - began["all"] - (time.process_time() - began["own"])
        prediction = model.plan.prediction
        shards = sorted(Path(folder).glob("*.safetensors"))
        return {
            "seconds": statistics.median(after - before for before, after in itertools.pairwise(seconds[1:])),
            "others": max(others, 0.0) / (time.perf_counter() - began["wall"]),
            "predicted": prediction.decode_seconds if prediction is not None else None,
            "read_bytes": model.plan.read_bytes,
            "link": read_rate(shards) if model.plan.read_bytes else None,
        }


def run(form: str, max_memory: str, tokens: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    form, _, own = form.partition("@")
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.packed", form, "--max-memory", own or max_memory]
    done = subprocess.run([*words, "--tokens", str(tokens), "--here"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "forms", nargs="+", metavar="FORM", help="FOLDER:exact or FOLDER:fast, with @900MiB; the first is compared with"
    )
    parser.add_argument("--max-memory", default="3000MiB")
    parser.add_argument("--tokens", type=int, default=6, help="passes of a run")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        folder, _, kernels = arguments.forms[0].rpartition(":")
        print(json.dumps(measure(folder, kernels, arguments.max_memory, arguments.tokens)))
        return
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in arguments.forms}
    for _ in range(arguments.turns):
        for form, runs in found.items():
            runs.append(run(form, arguments.max_memory, arguments.tokens))
            latest = runs[-1]
            print(f"{form}: {latest['seconds']:.3f} s, others {latest['others']:.2f} processors", flush=True)
    first = statistics.median(each["seconds"] for each in found[arguments.forms[0]])
    print("\n| form | s/token, median (all turns) | of the first | predicted | read a token | of the link |")
    print("|---|---|---|---|---|---|")
    for form, runs in found.items():
        median = statistics.median(each["seconds"] for each in runs)
        every = ", ".join(f"{each['seconds']:.2f}" for each in runs)
        predicted = statistics.median(each["predicted"] for each in runs)
        read = statistics.median(each["read_bytes"] for each in runs) / 1e9
        reached = [each["read_bytes"] / each["seconds"] / each["link"] for each in runs if each["link"]]
        of_link = f"{statistics.median(reached):.2f}" if reached else ""
        figures = f"{median:.2f} ({every}) | {median / first:.2f} | {predicted:.2f} | {read:.2f} GB | {of_link}"
        print(f"| {Path(form).name} | {figures} |")


if __name__ == "__main__":
    main()
