r"""How close streaming comes to the disk: airstream alone, against the raw link measured in the same run.

    python -m benchmarks.stream --checkpoint DIR [--limit-mib 3000] [--max-memory 1100MiB] [--turns 3]

Every turn is a process of its own: in a memory cgroup with a cold page cache if `--limit-mib` is given (needs root).
It measures the raw link (the same reader over the same layer batches, without computing), loads the model, generates,
and measures the raw link again. Prints a table and, as the last line, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import limited

ROOT = Path(__file__).resolve().parents[1]

ROWS = {
    "seconds_per_token": "s/token, first pass included",
    "decode_seconds_per_token": "s/token after the first",
    "ttft_seconds": "seconds to first token, from from_pretrained on",
    "ttft_passes": "... in passes over the weights at the raw link",
    "streamed_bytes": "bytes streamed",
    "decode_gb_per_second": "GB/s while decoding",
    "link_gb_per_second": "GB/s of the raw link, before and after",
    "link_share": "share of the raw link",
    "stall_seconds": "seconds stalled",
    "peak_rise_bytes": "peak rise of memory, bytes",
    "planned_peak_bytes": "planned peak, bytes",
    "budget_bytes": "budget, bytes",
    "peak_rss_bytes": "peak of the whole process, bytes",
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One turn, in this process."""
    import torch

    from airstream import AutoModel
    from airstream.system.memory import PeakMemory
    from benchmarks.peers.measure import TokenClock

    options = {"max_memory": arguments.max_memory, "max_context": arguments.prompt_tokens + arguments.new_tokens}
    options |= {"device": arguments.device, "page_cache": arguments.page_cache}
    with AutoModel.from_pretrained(arguments.checkpoint, **options) as model:
        before = model.measure_link()
    memory, clock = PeakMemory(), TokenClock()
    started = time.perf_counter()
    with AutoModel.from_pretrained(arguments.checkpoint, **options) as model:
        loaded = time.perf_counter()
        prompt = torch.arange(10, 10 + arguments.prompt_tokens, device=model.device)[None]
        count = arguments.new_tokens
        output = model.generate(
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, streamer=clock
        )
        ended = time.perf_counter()
        peak_rise = memory.rise()
        streamed, stalled = model.stats.streamed_bytes, model.stats.stall_seconds
        after = model.measure_link()
        plan = model.plan
    decode_seconds = (clock.seconds[-1] - clock.seconds[0]) / (count - 1)
    link = (before.nbytes + after.nbytes) / (before.seconds + after.seconds)
    decode_rate = before.nbytes / decode_seconds
    return {
        "tokens": output[0, arguments.prompt_tokens :].tolist(),
        "seconds_per_token": (ended - loaded) / count,
        "decode_seconds_per_token": decode_seconds,
        "ttft_seconds": clock.seconds[0] - started,
        "ttft_passes": (clock.seconds[0] - started) / (plan.checkpoint_bytes / link),
        "streamed_bytes": streamed,
        "decode_gb_per_second": decode_rate / 1e9,
        "link_gb_per_second": link / 1e9,
        "link_before_gb_per_second": before.nbytes / before.seconds / 1e9,
        "link_after_gb_per_second": after.nbytes / after.seconds / 1e9,
        "link_share": decode_rate / link,
        "stall_seconds": stalled,
        "peak_rise_bytes": peak_rise,
        "planned_peak_bytes": plan.tiers["cpu"].peak_bytes,
        "budget_bytes": plan.tiers["cpu"].budget_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "direct_io": plan.direct_io,
        "plan": json.loads(plan.to_json())
        | {"model": Path(arguments.checkpoint).name},  # no paths in what is published
    }


def run_turn(arguments: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """One turn in a process of its own, inside the limit.

    Raises:
        RuntimeError: it failed; the message has its last words.
    """
    command = [sys.executable, "-m", "benchmarks.stream", *argv, "--child"]
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        limit = None if arguments.limit_mib is None else arguments.limit_mib * limited.MIB
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        outcome = limited.run(command, limit_bytes=limit, stdout=stdout, stderr=stderr, cwd=ROOT, env=environment)
        stdout.seek(0)
        stderr.seek(0)
        if not outcome.is_success:
            raise RuntimeError(f"the run failed ({outcome}): {stderr.read().decode(errors='replace')[-2000:]}")
        record: dict[str, Any] = json.loads(stdout.read().splitlines()[-1])
    return record


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Median, minimum and maximum of every figure over the turns, as Markdown."""
    lines = ["| | median | min | max |", "|---|---|---|---|"]
    for key, label in ROWS.items():
        values = [record[key] for record in records]
        cells = (statistics.median(values), min(values), max(values))
        lines.append(f"| {label} | " + " | ".join(_number(value) for value in cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure `--turns` times and print the table and the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parse(argv)
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    records = []
    for turn in range(arguments.turns):
        print(f"turn {turn + 1} of {arguments.turns}", file=sys.stderr, flush=True)
        records.append(run_turn(arguments, argv))
    print(table(records))
    medians = {key: statistics.median(record[key] for record in records) for key in ROWS}
    settings = {key: value for key, value in vars(arguments).items() if key not in ("child", "checkpoint")}
    print(json.dumps({"settings": settings, "machine": _machine(), "median": medians, "turns": records}))


def _machine() -> dict[str, Any]:
    import torch

    from benchmarks.conditions import describe_machine

    return {**describe_machine(), "torch": torch.__version__}


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=lambda text: str(Path(text).absolute()))
    parser.add_argument("--limit-mib", type=int, help="memory of every turn, page cache included")
    parser.add_argument("--max-memory", default="1100MiB", help="what airstream is told (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--page-cache", action="store_true", help="read through the page cache")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
