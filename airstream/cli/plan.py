"""`airstream plan MODEL`: the plan for this machine or another one, a table of many, or a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from airstream import AutoModel, Machine, plan_table, plot_plan
from airstream.cli.parser import load_options
from airstream.cli.session import note
from airstream.errors import ArgumentError
from airstream.status import status
from airstream.table import CARDS
from airstream.table_text import FORMATS


def run(arguments: argparse.Namespace) -> None:
    """Print the plan that `from_pretrained` would follow with the same arguments; or a table; or draw a picture."""
    _refuse_idle(arguments)
    options = load_options(arguments)
    if arguments.table:
        _print_table(arguments, options)
        return
    if len(arguments.models) > 1 or "," in (arguments.gpu or ""):
        raise ArgumentError("several models or cards are for --table: add it, or name one")
    (model,) = arguments.models
    machine = Machine(gpu=arguments.gpu, ram=arguments.ram, disk_gbps=arguments.disk_gbps)
    planning = status(f"planning {Path(model).absolute().name}", is_timed=False)  # the hub may draw bars
    if arguments.plot is not None:
        with planning:
            plot_plan(model, machine=machine, file=arguments.plot, **options)
        note(f"drawn: {arguments.plot}")
        return
    with planning:
        plan = AutoModel.plan(model, machine=machine, prompt_tokens=arguments.prompt_tokens, **options)
    print(plan.to_json() if arguments.json else plan)


def _refuse_idle(arguments: argparse.Namespace) -> None:
    """Raise for what would have no effect."""
    if arguments.table:
        kind, idle = (
            "a table",
            {"--plot": arguments.plot, "--json beside --format": arguments.json and arguments.format},
        )
    elif arguments.plot is not None:
        kind = "a picture"
        idle = {"--json": arguments.json, "--format": arguments.format, "--prompt-tokens": arguments.prompt_tokens}
    else:
        kind, idle = "one plan", {"--format": arguments.format}
    for name, given in idle.items():
        if given:
            raise ArgumentError(f"{name} has no effect on {kind}: leave it out")


def _print_table(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    gpus = arguments.gpu.split(",") if arguments.gpu else CARDS
    machine = Machine(ram=arguments.ram, disk_gbps=arguments.disk_gbps)
    with status(f"planning {len(arguments.models)} models for {len(gpus)} cards", is_timed=False):
        table = plan_table(arguments.models, gpus, machine=machine, prompt_tokens=arguments.prompt_tokens, **options)
    print(FORMATS[arguments.format or ("json" if arguments.json else "text")](table))
