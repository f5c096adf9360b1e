"""Planning: what stays in memory, what is streamed, and what the peak will be, by arithmetic alone."""

from airstream.plan.facts import AdapterFacts, Arithmetic, BatchFacts, Group, ModelFacts
from airstream.plan.plan import ACTIVATIONS, KV_CACHE, Batch, Plan, Tier
from airstream.plan.planner import CONTEXTS, MIN_OVERLAPPED_CONTEXT, make_plan, smallest_plan
from airstream.plan.refusal import check_positions, too_much
from airstream.plan.request import HOST, Request, Workload
from airstream.plan.text import change_of
from airstream.plan.whatif import quantised, with_advice

__all__ = [
    "ACTIVATIONS",
    "AdapterFacts",
    "Arithmetic",
    "CONTEXTS",
    "HOST",
    "KV_CACHE",
    "MIN_OVERLAPPED_CONTEXT",
    "Batch",
    "BatchFacts",
    "Group",
    "ModelFacts",
    "Plan",
    "Request",
    "Tier",
    "Workload",
    "change_of",
    "check_positions",
    "make_plan",
    "quantised",
    "smallest_plan",
    "too_much",
    "with_advice",
]
