"""How near the planned memory is to what the kernel counts: planned and measured peaks of one call, over many shapes.

    python -m benchmarks.memory [--shapes llama] [--tokens 100,3000] [--dtypes float32] [--attentions sdpa,eager]
                                [--padded no,yes] [--chunks 0,512] [--threads 1] [--limit 4GiB] [--json]

A call is a generation of two tokens after a prompt of so many; in chunks, if a size is given. Padded, the first of its
tokens are hidden. Each has a process of its own, which has imported what it needs before it begins to count: both
peaks are above that. The checkpoints have random weights of the dtype that is computed in, and are made in `--work`,
each deleted after its last call. A call that is planned to need more than `--limit` is not made.

Knows Linux, where the kernel keeps a process's peak. Every line of the plan is in the JSON, which is the last line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.conditions import describe_machine
from benchmarks.limited import MIB

LONGEST = 40_000
"""Positions of the models, in tokens."""

NEW_TOKENS = 2

HIDDEN = 5
"""Tokens that padding hides."""

SHAPES: Mapping[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 2, "intermediate_size": 688, "vocab_size": 1000,
    },
    "llama-wide": {
        "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16,
        "num_key_value_heads": 4, "intermediate_size": 2816, "vocab_size": 32000,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 688, "moe_intermediate_size": 256,
        "num_experts": 16, "num_experts_per_tok": 2, "vocab_size": 1000,
    },
    "gemma3": {
        "model_type": "gemma3_text", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 688, "vocab_size": 1000, "sliding_window": 512,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """What is asked of a model of some shape. `chunk`: tokens of the prompt that are computed at once; 0 for all."""

    shape: str
    dtype: str
    attention: str
    is_padded: bool
    chunk: int
    threads: int
    tokens: int

    def describe(self) -> str:
        parts = (self.shape, self.dtype, self.attention, "padded" if self.is_padded else "-", self.chunk or "-")
        return "{:11} {:9} {:6} {:7} {:>6} ".format(*parts) + f"{self.threads:>2} {self.tokens:>7,}"


def write_checkpoint(shape: str, dtype: str, folder: Path) -> None:
    """Random weights of `shape`, as transformers initialises them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=LONGEST)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def measure(call: Call, folder: Path, limit_bytes: int) -> dict[str, Any]:
    """Plan `call` and make it, once, in this process: the bytes of every line, and the peak; None if too large."""
    import torch

    from airstream import AutoModel
    from airstream.plan.planner import make_plan
    from airstream.plan.request import Workload
    from airstream.system.memory import PeakMemory

    torch.set_num_threads(call.threads)
    context = call.tokens + NEW_TOKENS
    work = Workload(1, context, call.chunk or call.tokens, 1, prompt=call.tokens, is_padded=call.is_padded)
    memory = PeakMemory()
    with AutoModel.from_pretrained(
        folder, device="cpu", max_memory="1TiB", max_context=context, attn_implementation=call.attention
    ) as model:
        plans = model._engine.plans
        lines = make_plan(plans.facts, replace(plans.request, max_context=context, workload=work)).tiers["cpu"].items
        peak = None
        if sum(lines.values()) <= limit_bytes:
            ids = torch.arange(call.tokens)[None] % 90 + 3
            mask = torch.ones_like(ids)
            mask[0, : HIDDEN if call.is_padded else 0] = 0
            chunks = {"prefill_chunk_size": call.chunk} if call.chunk else {}
            length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
            model.generate(ids, attention_mask=mask, do_sample=False, **length, **chunks)
            peak = memory.rise()
    return {"planned_bytes": sum(lines.values()), "measured_bytes": peak, "lines": dict(lines)}


def _run(call: Call, folder: Path, limit_bytes: int) -> dict[str, Any]:
    asked = json.dumps(asdict(call))
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", asked, str(folder), str(limit_bytes)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(call: Call, found: Mapping[str, Any]) -> str:
    """A line of the table: MiB, measured over planned, and the share of the plan that its largest lines have."""
    if "error" in found:
        return f"{call.describe()} failed: {found['error']}"
    planned, measured = found["planned_bytes"], found["measured_bytes"]
    lines = sorted(found["lines"].items(), key=lambda line: -line[1])
    shares = ", ".join(f"{name} {nbytes / planned:.0%}" for name, nbytes in lines if nbytes >= planned / 100)
    if measured is None:
        return f"{call.describe()} {planned / MIB:8.1f}  not made"
    return f"{call.describe()} {planned / MIB:8.1f} {measured / MIB:8.1f} {measured / planned:5.2f}  {shares}"


def calls(arguments: argparse.Namespace) -> Iterator[tuple[tuple[str, str], list[Call]]]:
    """What is asked for, by checkpoint."""
    rest = (arguments.attentions, arguments.padded, arguments.chunks, arguments.threads, arguments.tokens)
    for shape, dtype in itertools.product(arguments.shapes, arguments.dtypes):
        made = (Call(shape, dtype, *each) for each in itertools.product(*rest))
        yield (shape, dtype), [call for call in made if call.chunk < call.tokens]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse(argv)
    if arguments.measure:
        asked, folder, limit = arguments.measure
        print(json.dumps(measure(Call(**json.loads(asked)), Path(folder), int(limit))))
        return
    heads = "{:11} {:9} {:6} {:7} {:>6} {:>2} {:>7} {:>8} {:>8} {:>5}  {}"
    named = ("shape", "dtype", "kernel", "padding", "chunk", "th", "tokens", "planned", "measured", "ratio", "lines")
    print(heads.format(*named))
    results = []
    for (shape, dtype), asked in calls(arguments):
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            write_checkpoint(shape, dtype, Path(folder))
            for call in asked:
                found = _run(call, Path(folder), arguments.limit)
                results.append(asdict(call) | found)
                print(row(call, found), flush=True)
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "results": results}))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from airstream.reporting.units import parse_bytes

    def names(text: str) -> list[str]:
        return text.split(",")

    def counts(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def shapes(text: str) -> list[str]:
        if unknown := set(names(text)) - SHAPES.keys():
            raise argparse.ArgumentTypeError(f"no such shape: {', '.join(sorted(unknown))}")
        return names(text)

    def paddings(text: str) -> list[bool]:
        return [{"no": False, "yes": True}[part] for part in names(text)]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, default=["llama", "qwen3-moe", "gemma3"], help=", ".join(SHAPES))
    parser.add_argument("--tokens", type=counts, default=[100, 1000, 3000, 10_000, 30_000])
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16", "float16"])
    parser.add_argument("--attentions", type=names, default=["sdpa", "eager"])
    parser.add_argument("--padded", type=paddings, default=[False, True], metavar="no,yes")
    parser.add_argument("--chunks", type=counts, default=[0], help="prefill_chunk_size; 0 for none")
    parser.add_argument("--threads", type=counts, default=[1])
    parser.add_argument("--limit", type=parse_bytes, default=4 << 30, help="4GiB if not given")
    parser.add_argument("--work", type=Path, help="where checkpoints are made; a temporary folder if not given")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
