"""`airstream generate MODEL PROMPT`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from airstream.cli.parser import generation_options
from airstream.cli.session import encode, encode_chat, load, note, printing
from airstream.figures import check_file, check_folder, new_figure
from airstream.profiling import Profile
from airstream.report import Meter


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation as it comes, or one JSON object with it and its costs."""
    if arguments.trace:
        check_folder(Path(arguments.trace))
    if arguments.plot:
        check_file(new_figure(), Path(arguments.plot))
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    meter = Meter()
    is_profiling = bool(arguments.profile or arguments.trace or arguments.plot)
    with load(arguments, profiling_mode=is_profiling) as model:
        inputs = encode_chat(model, [{"role": "user", "content": prompt}]) if arguments.chat else encode(model, prompt)
        with printing(model, arguments.json) as meter.forward_to:
            meter.start(model.stats)
            output = model.generate(**inputs, **generation_options(arguments), streamer=meter)
        report = meter.report(model.plan, model.stats)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        if arguments.json:
            text = model.tokenizer.decode(new_tokens, skip_special_tokens=True)
            profile = {"profile": model.last_profile.to_dict()} if is_profiling else {}
            costs = {"model": arguments.model, "prompt": prompt, "text": text, **report.to_dict(), **profile}
            print(json.dumps(costs))
        if arguments.stats:
            note(str(report))
        if is_profiling:
            _show(arguments, model.last_profile)


def _show(arguments: argparse.Namespace, profile: Profile) -> None:
    if arguments.profile and not arguments.json:
        note(str(profile))
    if arguments.trace:
        profile.save_trace(arguments.trace)
    if arguments.plot:
        profile.plot(arguments.plot)
