"""`airstream demo`: a small real model answers in less memory than it has weights."""

from __future__ import annotations

import argparse

from airstream.cli.session import encode_chat, load, note, printing
from airstream.demo.model import prepare_gguf
from airstream.report import Meter
from airstream.units import format_bytes

MAX_NEW_TOKENS = 64


def run(arguments: argparse.Namespace) -> None:
    """Fetch the model if need be, print the question, the answer as it comes, and what it cost."""
    file = prepare_gguf()
    loading = argparse.Namespace(
        model=file, dtype="bfloat16", max_memory=[arguments.max_memory], device=arguments.device
    )
    meter = Meter()
    # Around the page cache: the figures are those of the disk, as with a model that does not fit in memory.
    with load(loading, max_context=256, page_cache=False) as model:
        plan = model.plan
        note(
            f"SmolLM2-135M-Instruct: {format_bytes(plan.checkpoint_bytes)} of weights in {plan.dtype}, streamed packed "
            f"from {format_bytes(file.stat().st_size)} of GGUF within {arguments.max_memory} on {plan.device}"
        )
        print(f"> {arguments.question}")
        inputs = encode_chat(model, [{"role": "user", "content": arguments.question}])
        with printing(model) as meter.forward_to:
            meter.start(model.stats)
            model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, streamer=meter)
        note(str(meter.report(plan, model.stats)))
