"""This knows which plan a running model follows: when calls ask for another one, and when they are refused.

It knows what calls ask for, what plans have room for, and when a change pays. It refuses to know how plans are made, or
how one is followed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from airstream.errors import BudgetError
from airstream.plan.facts import AdapterFacts, ModelFacts
from airstream.plan.plan import Plan
from airstream.plan.planner import make_plan, plan_or_none, smallest_plan
from airstream.plan.policy import GROWTH, MIN_GAIN
from airstream.plan.refusal import check_positions, too_much
from airstream.plan.request import Request, Workload
from airstream.plan.text import change_of
from airstream.reporting.units import format_bytes

logger = logging.getLogger(__name__)


class Plans:
    """The plan that is followed now, and the one that is followed while calls ask for no more than usual.

    Args:
        plan: the first one.
        facts, request: what it was made of, and others can be.
        is_final: calls are to be made to fit the plan, not the plan the calls.
        follow: goes on by another plan, and notes it in `current`.

    Attributes:
        current: the plan that is followed.
        adapters: what is beside the model.
    """

    def __init__(
        self, plan: Plan, facts: ModelFacts, request: Request, is_final: bool, follow: Callable[[Plan], None]
    ) -> None:
        self.current = self._normal = plan
        self.facts = facts
        self.request = request
        self.adapters = AdapterFacts()
        self._is_final = is_final
        self._follow = follow
        self._has_warned = False

    def has_room(self, work: Workload) -> bool:
        """Whether KV caches and activations of `work` fit, if need be in place of weights that stay."""
        return work.bytes(self.facts.footprint) <= self.current.work_bytes or self._with_room_for(work) is not None

    def kv_bytes(self, work: Workload) -> int:
        """The bytes of the KV caches of `work`."""
        return work.kv_bytes(self.facts.footprint)

    def activation_bytes(self, work: Workload | None) -> int:
        """The bytes of the activations of `work`, as far as it is known."""
        return work.activation_bytes(self.facts.footprint) if work is not None else 0

    def expect(self, work: Workload | None, is_asked: bool) -> None:
        """A generation is about to begin that asks for `work` at its end, if that is known.

        What it does not need of the memory that was set aside for KV cache and activations holds weights meanwhile.

        Args:
            is_asked: the caller says how long it may get. Else it may well end before, and the prompt alone has to fit.

        Raises:
            BudgetError, ArgumentError: it cannot be done, with what can be.
        """
        if work is None:
            return
        self._warn_of_length(work.prompt)
        self._check_possible(work if is_asked else replace(work, context=work.prompt))
        fits = work.bytes(self.facts.footprint) <= self.current.work_bytes
        if self._is_final or (fits and not self.current.streamed_bytes):
            return
        plan = self._with_room_for(work)
        if plan is None:
            return  # it may end early; a pass that does not fit is refused when it comes to it
        gain = plan.resident_bytes + plan.hosted_bytes - self.current.resident_bytes - self.current.hosted_bytes
        if not fits or gain > MIN_GAIN * plan.checkpoint_bytes:
            self._normal = plan
            self._follow(plan)

    def admit(self, work: Workload) -> None:
        """Make room for a forward pass, or refuse it, before it has begun.

        If its KV cache and activations need more than is set aside for them, resident weights are given up; when it
        needs no more than usual, they come back.

        Raises:
            BudgetError: nothing more can be given up; with the numbers and what to change.
            ArgumentError: the model has no positions for so many tokens.
        """
        check_positions(self.facts, work)
        self._warn_of_length(work.tokens)
        need = work.bytes(self.facts.footprint)
        if need > self.current.work_bytes:
            self._outgrow(work, need)
        elif self.current is not self._normal and not work.beside_bytes and need <= self._normal.work_bytes:
            self._follow(self._normal)

    def make_room(self, adapters: AdapterFacts) -> None:
        """Adapters that cost this much are beside the model from now on, in place of those that were.

        Raises:
            BudgetError: they do not fit, even if no weight stays in memory.
        """
        facts = self.facts.with_adapters(adapters)
        plan = make_plan(facts, self.request)
        self.facts, self.adapters, self._normal = facts, adapters, plan
        self._follow(plan)

    def _warn_of_length(self, tokens: int) -> None:
        """Say once that a prompt of so many tokens is longer than those that the model was trained with."""
        limit = self.facts.rotary_limit
        if limit is not None and tokens > limit and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a prompt of %s tokens is longer than the %s positions that %s was trained for: answers may make no "
                "sense",
                f"{tokens:,}",
                f"{limit:,}",
                self.facts.name,
            )

    def _check_possible(self, work: Workload) -> None:
        """Refuse `work` if no plan has room for it."""
        check_positions(self.facts, work)
        if not self.has_room(work):
            left = smallest_plan(self.facts, replace(self.request, max_context=1)).work_bytes
            raise BudgetError(too_much(work, self.facts.footprint, left))

    def _outgrow(self, work: Workload, need: int) -> None:
        """Change to a plan with room for `work`, and some more if there is some."""
        plan = self._with_room_for(replace(work, context=int(GROWTH * work.context))) or self._with_room_for(work)
        if plan is None:
            self._check_possible(work)
            return
        if change := change_of(self.current, plan):
            logger.warning(
                "%s x %s tokens need %s for KV cache and activations: %s",
                work.batch_size,
                f"{work.context:,}",
                format_bytes(need),
                change,
            )
        self._follow(plan)

    def _with_room_for(self, work: Workload) -> Plan | None:
        request = replace(self.request, max_context=work.context, max_batch_size=work.batch_size, workload=work)
        return plan_or_none(self.facts, request)
