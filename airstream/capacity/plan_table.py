"""This says what fits which card: models x precisions x cards, a plan for each, as rows of numbers.

It knows plans. It refuses to know how rows are written (`table.py`), and needs no weights: a config is enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from airstream.capacity.rows import Row, short_name
from airstream.capacity.table import Table
from airstream.codecs.names import CODEC_NAMES
from airstream.errors import ArgumentError, UnsupportedError
from airstream.loading.asked import codec_name
from airstream.loading.machine import THIS_MACHINE, Machine, Question, check_machine, request_for
from airstream.loading.options import parse_max_memory
from airstream.loading.prepare import prepare_for_planning
from airstream.loading.prepared import Prepared
from airstream.plan.facts import ModelFacts
from airstream.plan.plan import Plan
from airstream.plan.planner import plan_or_none, smallest_plan, smallest_whole_plan
from airstream.plan.policy import AUTO_SHARE
from airstream.plan.request import HOST, Request
from airstream.rates.cards import find_card
from airstream.reporting.units import GIB, format_bytes

CARDS = (
    "RTX 2060", "RTX 4060", "RTX 3060 12GB", "T4", "RTX 3090", "RTX 4090", "RTX 5090", "L40S", "A100 PCIe 80GB",
    "H100 SXM",
)  # fmt: skip
"""Cards that people have, from 6 to 80 GiB."""

SHORT_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def plan_table(
    models: Sequence[str | os.PathLike[str]],
    gpus: Sequence[str] = CARDS,
    *,
    machine: Machine = THIS_MACHINE,
    prompt_tokens: int | None = None,
    **options: Any,
) -> Table:
    """A plan for every model at every precision on every card. Reads configs, and headers of weights that are there.

    Precisions are the dtype, and every codec that the model can be packed with, as `compression=` would; if that is
    given, it is the only one.

    Args:
        models: folders or hub ids.
        gpus: names of cards. None of them has to be here.
        machine: whose memory and disk go with the cards; it has no `gpu` itself.
        prompt_tokens: as `AutoModel.plan`.
        options: as `AutoModel.from_pretrained`, but that `dtype` is float16 unless given.

    Raises:
        ArgumentError: a name or an option makes no sense here.
    """
    if not all(isinstance(each, Sequence) and not isinstance(each, (str, bytes)) and each for each in (models, gpus)):
        raise ArgumentError('a table needs lists of models and of cards: plan_table(["some/model"], ["RTX 3090"])')
    check_machine(machine)
    if machine.gpu is not None:
        raise ArgumentError(f"machine has gpu={machine.gpu!r}, but a table is about gpus={list(gpus)}: leave one out")
    if "0" in parse_max_memory(options.get("max_memory"), torch.device("cuda", 0)):
        raise ArgumentError('max_memory of the device would make all cards alike: give {"cpu": ...} alone, or no table')
    machines = [replace(machine, gpu=find_card(gpu).name) for gpu in gpus]  # told before anything is fetched
    rows: list[Row] = []
    left_out: list[str] = []
    for model in models:
        dtype = {} if "torch_dtype" in options else {"dtype": "float16"}
        prepared = partial(prepare_for_planning, model, prompt_tokens=prompt_tokens)
        asked = prepared(dtype | options, machines[0])
        packed = asked.options.compression
        precision = SHORT_NAMES.get(asked.facts.dtype, asked.facts.dtype) if packed is None else codec_name(packed)
        rows += _rows(precision, partial(prepared, dtype | options), asked, short_name(model), machines)
        for codec in CODEC_NAMES if packed is None and asked.quantizer is None else ():
            given = dtype | options | {"compression": codec}
            try:
                packed_so = prepared(given, machines[0])
            except UnsupportedError as error:
                left_out.append(f"{short_name(model)} has no {codec}: {error}.")
                continue
            if packed_so.facts != asked.facts:  # else there is nothing to pack
                rows += _rows(codec, partial(prepared, given), packed_so, short_name(model), machines)
    return Table(tuple(rows), (*_notes(asked.request), *left_out))


def _rows(
    precision: str, prepared: Callable[[Machine], Prepared], first: Prepared, name: str, machines: Sequence[Machine]
) -> list[Row]:
    """The rows of a model at one precision: `first` is what `prepared` gives for the first machine."""
    if first.quantizer is None or not first.quantizer.needs_fp8:
        return list(_rows_alike(precision, first, name, machines))
    rows: dict[str, Row] = {}
    for has_fp8 in (True, False):  # some cards multiply its weights as they are
        alike = [each for each in machines if find_card(str(each.gpu)).has_fp8 is has_fp8]
        if alike:
            asked = first if alike[0] is machines[0] else prepared(alike[0])
            rows |= {row.card: row for row in _rows_alike(precision, asked, name, alike)}
    return [rows[str(each.gpu)] for each in machines]


def _rows_alike(precision: str, asked: Prepared, name: str, machines: Sequence[Machine]) -> Iterator[Row]:
    facts = replace(asked.facts, name=name)
    question = Question(
        asked.options, machines[0], asked.folder, asked.device, asked.staged, asked.request.prompt_tokens
    )
    needed: dict[int, int] = {}  # by context
    for machine in machines:
        request = request_for(replace(question, machine=machine), facts)
        plan = plan_or_none(facts, request)
        shown = plan or smallest_plan(facts, request)
        context = shown.max_context
        if context not in needed:
            needed[context] = _needed_bytes(facts, request, context)
        yield _row(precision, machine, facts, shown, needed[context], fits=plan is not None)


def _row(precision: str, machine: Machine, facts: ModelFacts, plan: Plan, needed: int, fits: bool) -> Row:
    card = find_card(str(machine.gpu))
    vram, ram = plan.tiers[plan.computes_on], plan.tiers[HOST]
    per_token = facts.footprint.kv_elements * facts.footprint.item_bytes
    is_whole = fits and not plan.streamed_bytes and not plan.rows_from_disk
    row = Row(
        model=facts.name,
        precision=precision,
        card=card.name,
        vram_bytes=card.vram_gib * GIB,
        vram_budget_bytes=vram.budget_bytes,
        ram_budget_bytes=ram.budget_bytes,
        weights_bytes=facts.checkpoint_bytes,
        context=plan.max_context,
        batch_size=plan.max_batch_size,
        kv_bytes_per_token=per_token,
        kv_bytes=per_token * plan.max_context * plan.max_batch_size,
        needed_bytes=min(needed, vram.peak_bytes) if is_whole else needed,  # with less room, groups take less of it
        verdict="does not fit" if not fits else "fits" if is_whole else "streams",
    )
    if not fits:
        return replace(row, least_vram_bytes=vram.peak_bytes, least_ram_bytes=ram.peak_bytes)
    expected = plan.prediction
    assert expected is not None  # the request says what the machine can do
    return replace(
        row,
        resident_bytes=plan.resident_bytes + facts.resident_bytes,
        hosted_bytes=plan.hosted_bytes,
        decode_seconds=expected.decode_seconds,
        first_token_seconds=expected.prefill_seconds,
        bottleneck=expected.bottleneck,
    )


def _needed_bytes(facts: ModelFacts, request: Request, context: int) -> int:
    """The device's peak with everything in its memory, packed if that is less."""
    whole = smallest_whole_plan(facts, replace(request, max_context=context, hardware=None))
    return whole.tiers[request.tier].peak_bytes


def _notes(request: Request) -> Iterator[str]:
    hardware = request.hardware
    assert hardware is not None  # there is always something to assume
    yield (
        f"Of each card's memory {AUTO_SHARE:.0%} is used. RAM: {format_bytes(request.budgets[HOST])} "
        f"({request.budget_notes[HOST]}). Disk: {hardware.disk.per_second / 1e9:.3g} GB/s ({hardware.disk.source})."
    )
    yield (
        "lossless, nf4, int4, int8 and fp8 are what compression= makes of the checkpoint. The results of lossless are "
        "equal to the bit; the others round the weights of the layers, and the lm_head and the embeddings stay as they "
        "are."
    )
    yield "Seconds are predicted from data sheets: one token for every sequence."
