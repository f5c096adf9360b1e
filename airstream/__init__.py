"""airstream: run language models bigger than your GPU or RAM by streaming their layers from disk, exactly.

    from airstream import AutoModel
    model = AutoModel.from_pretrained("some/model", max_memory={0: "4GiB", "cpu": "8GiB"})

Importing the package is silent and cheap: torch and transformers are imported when `AutoModel` is first asked for.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from airstream.errors import (
    AirstreamError,
    ArgumentError,
    BudgetError,
    CheckpointError,
    CheckpointNotFoundError,
    ClosedError,
    DiskSpaceError,
    ReadError,
    UnsupportedError,
)
from airstream.reporting.status import status as telling  # by that name it would hide its module
from airstream.system.forks import BORN_AS  # noqa: F401 - from now on a fork is known as one, whatever it imports
from airstream.system.importing import quiet_imports

if TYPE_CHECKING:
    from airstream.auto import AutoModel
    from airstream.capacity.map import plot_plan
    from airstream.capacity.plan_table import plan_table
    from airstream.loading.machine import Machine
    from airstream.plan.plan import Plan
    from airstream.repacking.repack import repack
    from airstream.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "AirstreamError",
    "ArgumentError",
    "AutoModel",
    "BudgetError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClosedError",
    "DiskSpaceError",
    "Machine",
    "Plan",
    "ReadError",
    "UnsupportedError",
    "__version__",
    "plan_table",
    "plot_plan",
    "repack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        return _look_up(name)
    shows = "torch" not in sys.modules and "airstream.cli" not in sys.modules  # commands have a line of their own
    with telling("importing torch and transformers", shows), quiet_imports():
        _import_tqdm()
        return _look_up(name)


def _import_tqdm() -> None:
    """Before transformers does: in notebooks tqdm tells the first who imports it that ipywidgets are not there.

    Alone, because it is done without warnings: the filters that torch and transformers set have to outlast it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(ImportError):
            importlib.import_module("tqdm.auto")


def _look_up(name: str) -> Any:
    if name == "AutoModel":
        from airstream.auto import AutoModel

        return AutoModel
    if name == "Machine":
        from airstream.loading.machine import Machine

        return Machine
    if name == "Plan":
        from airstream.plan.plan import Plan

        return Plan
    if name == "plan_table":
        from airstream.capacity.plan_table import plan_table

        return plan_table
    if name == "plot_plan":
        from airstream.capacity.map import plot_plan

        return plot_plan
    if name == "repack":
        from airstream.repacking.repack import repack

        return repack
    if name == "verify":
        from airstream.verification.verify import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
