"""This counts what a plan moves and multiplies in one pass, and so how long a pass takes.

It knows plans and sizes. It refuses to know how rates are measured.
"""

from __future__ import annotations

from dataclasses import replace

from airstream.plan.facts import ModelFacts
from airstream.plan.plan import Plan
from airstream.plan.predict import Traffic, predict
from airstream.plan.request import HOST, Request


def with_prediction(plan: Plan, facts: ModelFacts, request: Request) -> Plan:
    """`plan` with its prediction, if the request says what the machine can do."""
    if request.hardware is None:
        return plan
    prompt_tokens = min(request.prompt_tokens, plan.max_context)
    traffic = traffic_of(plan, facts, on_cpu=request.tier == HOST)
    prediction = predict(traffic, request.hardware, plan.max_batch_size, prompt_tokens, plan.max_context)
    return replace(plan, prediction=prediction)


def traffic_of(plan: Plan, facts: ModelFacts, on_cpu: bool) -> Traffic:
    """What one pass over all layers moves and multiplies."""
    sums = facts.arithmetic
    stored_bytes = facts.stored_bytes or sums.weight_bytes
    return Traffic(
        dtype=facts.dtype,
        item_bytes=sums.weight_bytes / max(sums.num_weights, 1),
        on_cpu=on_cpu,
        num_layers=sums.num_layers,
        weight_bytes=sums.weight_bytes,
        head_bytes=sums.head_bytes,
        expert_bytes=sums.expert_bytes,
        expert_share=sums.expert_share,
        kv_bytes_per_token=facts.footprint.kv_elements * facts.footprint.item_bytes,
        attention_width=sums.attention_width,
        product_seconds_per_byte=sums.product_seconds / max(sums.weight_bytes, 1),
        packed_bytes=plan.packed_bytes,
        made_bytes=plan.made_bytes,
        disk_bytes=plan.read_bytes if plan.direct_io else 0,
        cached_bytes=0 if plan.direct_io else plan.read_bytes,
        first_disk_bytes=stored_bytes,
        decoding_seconds_per_byte=facts.decoding_seconds_per_byte,
        decoding_traffic_per_byte=facts.decoding_traffic_per_byte,
        h2d_bytes=0 if on_cpu else _crossing_bytes(plan, is_packed=facts.stored_bytes is not None),
        first_h2d_bytes=0 if on_cpu else stored_bytes,
        reads_ahead=plan.prefetch_batches > 0,
    )


def _crossing_bytes(plan: Plan, is_packed: bool) -> int:
    """To the accelerator in every pass. What is packed crosses packed, from disk and from host memory."""
    if not is_packed:
        return plan.streamed_bytes
    return plan.read_bytes + plan.hosted_bytes
