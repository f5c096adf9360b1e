"""`airstream demo`: a small real model answers in less memory than it has weights, and transformers gives the same."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from airstream.cli.encoding import encode_chat
from airstream.cli.notes import note, program, tell
from airstream.cli.session import load, printing
from airstream.demo.check import answer_of_transformers, has_room
from airstream.demo.model import prepare_gguf
from airstream.errors import ArgumentError
from airstream.plan.plan import Plan
from airstream.profiling.report import Meter, RunReport
from airstream.reporting.status import status
from airstream.reporting.units import counted, format_bytes

MAX_NEW_TOKENS = 64

READING_SECONDS = 10
"""About what the check takes before it answers, which takes it about as long as it took here."""


def run(arguments: argparse.Namespace) -> int:
    """Fetch the model if need be, answer, say what that took, and whether transformers answers the same."""
    if not arguments.question.strip():
        raise ArgumentError("the question is empty: give some text to answer")
    file = prepare_gguf()
    tell("loading SmolLM2-135M")
    loading = argparse.Namespace(
        model=file, dtype="bfloat16", max_memory=[arguments.max_memory], device=arguments.device
    )
    meter = Meter()
    # Around the page cache: the figures are those of the disk, as with a model that does not fit in memory.
    with load(loading, max_context=256, page_cache=False) as model:
        plan = model.plan
        print(f"> {arguments.question}")
        inputs = encode_chat(model, [{"role": "user", "content": arguments.question}])
        with printing(model, max_tokens=MAX_NEW_TOKENS) as meter.forward_to:
            meter.start(model.stats)
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, streamer=meter)
        report = meter.report(plan, model.stats)
    note(f"\n{_cost(plan, report, file)}\n{report}\n")
    status_code = 0 if arguments.no_check else _check(plan, file, output.cpu(), report)
    note(f"Next, talk to it:\n  {shlex.join([program(), *next_command(file)])}")
    return status_code


def next_command(file: Path) -> list[str]:
    """To talk to the model: with room for the keys and values of a conversation."""
    return ["chat", os.fspath(file), "--dtype", "bfloat16", "--max-memory", "300MiB"]


def _cost(plan: Plan, report: RunReport, file: Path) -> str:
    packed = format_bytes(file.stat().st_size)
    return (
        f"{format_bytes(plan.checkpoint_bytes)} of weights in {format_bytes(report.peak_bytes)} of memory: "
        f"SmolLM2-135M in {plan.dtype} on {plan.device}, streamed from {packed} of GGUF for every token"
    )


def _check(plan: Plan, file: Path, output: torch.Tensor, report: RunReport) -> int:
    """Compare the answer with transformers', and tell. Returns the exit status: 1 if there is a difference."""
    if plan.device != "cpu":
        note(f"Not compared with transformers: that would be on the CPU, which rounds otherwise than {plan.device}.")
        return 0
    if not has_room():
        note("Not compared with transformers: there is not enough free memory for it to hold all weights.")
        return 0
    prompt_ids, ids = output[:, : report.prompt_tokens], output[0, report.prompt_tokens :].tolist()
    seconds = READING_SECONDS + round(report.total_seconds)
    doing = f"checking, about {seconds} s: transformers answers with all weights in memory (Ctrl-C: leave that out)"
    tell(doing)
    try:
        with status(doing):
            theirs = answer_of_transformers(file, prompt_ids, MAX_NEW_TOKENS)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        note("Not compared with transformers: interrupted.")
        return 0
    same = theirs == ids
    note(
        f"The same {counted(len(ids), 'token')} as transformers with all weights in memory (checked just now)."
        if same
        else f"NOT the tokens of transformers with all weights in memory, which are {theirs}: please report this."
    )
    return 0 if same else 1
