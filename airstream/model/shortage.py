"""This says that the machine has less memory than the plan was made for, and lets go of what can be missed.

It knows the plan. It refuses to know how a refusal of memory looks: `transfer.shortage` recognises it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from airstream.errors import BudgetError
from airstream.plan.plan import Plan
from airstream.plan.request import HOST
from airstream.reporting.units import format_bytes
from airstream.system.memory import available_host_bytes
from airstream.transfer.shortage import ShortageError, shortage_in


@contextmanager
def explained(plan: Callable[[], Plan | None]) -> Iterator[None]:
    """Around whatever takes memory that was planned by `plan`, which is asked once it has been refused: None before.

    Raises:
        BudgetError: it was refused; with what was asked for, what the plan takes, and the remedy.
    """
    try:
        yield
    except Exception as error:
        shortage = shortage_in(error)
        if shortage is None:
            raise
        # Whoever keeps the error, as notebooks do, would keep what was allocated before it.
        traceback.clear_frames(error.__traceback__)
        planned = plan()
        if planned is not None:
            raise _by_plan(shortage, planned) from error
        if shortage is not error:
            raise shortage from error
        raise


def _by_plan(shortage: ShortageError, plan: Plan) -> BudgetError:
    """The same, in the terms of `plan`."""
    name = HOST if shortage.is_on_host else plan.computes_on
    tier = plan.tiers[name]
    memory, key = ("host memory", f'"{name}"') if name == HOST else (f"memory of device {name}", name)
    peak = format_bytes(tier.peak_bytes)
    free = f", and {format_bytes(available_host_bytes())} are free now" if name == HOST else ""
    return BudgetError(
        f"{shortage.asked} of {memory} could not be allocated: there is not so much. The plan takes {peak} of it in "
        f"all, within the {format_bytes(tier.budget_bytes)} of max_memory ({tier.budget_note}){free}. Load the model "
        f"with a smaller max_memory={{{key}: ...}}, below {peak}, or end what else uses that memory"
    )
