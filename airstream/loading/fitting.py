"""This makes the plan of a model that was prepared. If none fits, it looks whether fast kernels would, and says so.

It knows who prepares a model. It refuses to know why fast kernels take less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from airstream.errors import AirstreamError, BudgetError
from airstream.loading.options import EXACT, LoadOptions
from airstream.loading.prepared import Prepared
from airstream.plan.plan import Plan
from airstream.plan.planner import make_plan, plan_or_none

WOULD_FIT = (
    'With kernels="fast" it would fit into what there is: weights stay packed, and products round otherwise than '
    "transformers'"
)


def fitting_plan(prepared: Prepared, again: Callable[[LoadOptions], Prepared]) -> Plan:
    """The best plan for `prepared` that fits its budgets.

    Args:
        again: prepares the same model for the same machine, with other options.

    Raises:
        BudgetError: as `make_plan`; the message names fast kernels, too, if they would fit.
    """
    try:
        return make_plan(prepared.facts, prepared.request)
    except BudgetError as error:
        if _fits_fast(prepared, again):
            raise BudgetError(f"{error}. {WOULD_FIT}") from None
        raise


def _fits_fast(prepared: Prepared, again: Callable[[LoadOptions], Prepared]) -> bool:
    if prepared.options.kernels != EXACT or prepared.device.type != "cpu":
        return False
    try:
        fast = again(replace(prepared.options, kernels="fast"))
    except AirstreamError:  # there are no such kernels here, or not for this model
        return False
    return plan_or_none(fast.facts, fast.request) is not None
