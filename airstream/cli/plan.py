"""`airstream plan MODEL`: the plan for this machine or another one, a table of many, or a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from airstream import AutoModel, Machine, plan_table, plot_plan
from airstream.capacity.plan_table import CARDS
from airstream.capacity.table import FORMATS
from airstream.cli.notes import note
from airstream.cli.options import load_options
from airstream.reporting.status import status
from airstream.reporting.units import counted


def run(arguments: argparse.Namespace) -> None:
    """Print the plan that `from_pretrained` would follow with the same arguments; or a table; or draw a picture."""
    options = load_options(arguments)
    if arguments.table:
        _print_table(arguments, options)
        return
    (model,) = arguments.models
    machine = Machine(gpu=arguments.gpu, ram=arguments.ram, disk_gbps=arguments.disk_gbps)
    if arguments.plot is not None:
        plot_plan(model, machine=machine, file=arguments.plot, **options)
        note(f"drawn: {arguments.plot}")
        return
    with status(f"planning {Path(model).absolute().name}", is_timed=False):  # the hub may draw bars
        plan = AutoModel.plan(model, machine=machine, prompt_tokens=arguments.prompt_tokens, **options)
    print(plan.to_json() if arguments.json else plan)


def _print_table(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    gpus = arguments.gpu.split(",") if arguments.gpu else CARDS
    machine = Machine(ram=arguments.ram, disk_gbps=arguments.disk_gbps)
    with status(f"planning {counted(len(arguments.models), 'model')} for {counted(len(gpus), 'card')}", is_timed=False):
        table = plan_table(arguments.models, gpus, machine=machine, prompt_tokens=arguments.prompt_tokens, **options)
    print(FORMATS[arguments.format or ("json" if arguments.json else "text")](table))
