"""`airstream plan MODEL`."""

from __future__ import annotations

import argparse

from transformers import logging as transformers_logging

from airstream import AutoModel
from airstream.cli.parser import load_options


def run(arguments: argparse.Namespace) -> None:
    """Print the plan that `from_pretrained` would follow with the same arguments."""
    transformers_logging.set_verbosity_error()
    plan = AutoModel.plan(arguments.model, **load_options(arguments))
    print(plan.to_json() if arguments.json else plan)
