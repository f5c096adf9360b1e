"""`airstream generate MODEL PROMPT`."""

from __future__ import annotations

import argparse
import json
import sys

from airstream.cli.parser import generation_options
from airstream.cli.session import encode, encode_chat, load, note, printer
from airstream.report import Meter


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation as it comes, or one JSON object with it and its costs."""
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    meter = Meter()
    with load(arguments) as model:
        inputs = encode_chat(model, [{"role": "user", "content": prompt}]) if arguments.chat else encode(model, prompt)
        meter.forward_to = None if arguments.json else printer(model)
        meter.start(model.stats)
        output = model.generate(**inputs, **generation_options(arguments), streamer=meter)
        report = meter.report(model.plan, model.stats)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        if arguments.json:
            text = model.tokenizer.decode(new_tokens, skip_special_tokens=True)
            print(json.dumps({"model": arguments.model, "prompt": prompt, "text": text, **report.to_dict()}))
        if arguments.stats:
            note(str(report))
