"""The process that `benchmarks.stream` starts for every turn, with the options of the program itself.

It imports torch. It prints what it has measured as one line of JSON, the last of standard output.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from airstream import AutoModel
from airstream.system.memory import PeakMemory
from benchmarks.peers.measure import TokenClock
from benchmarks.stream.settings import parse


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One turn, in this process."""
    options = {"max_memory": arguments.max_memory, "max_context": arguments.prompt_tokens + arguments.new_tokens}
    options |= {"device": arguments.device, "page_cache": arguments.page_cache}
    with AutoModel.from_pretrained(arguments.checkpoint, **options) as model:
        before = model.measure_link()
    if not before.nbytes:
        sys.exit("nothing is streamed within this budget: the whole model stays in memory. Give a smaller --max-memory")
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


if __name__ == "__main__":
    print(json.dumps(measure(parse(sys.argv[1:]))))
