"""This goes from what the user named to everything that is known about a model before its first weight is read.

It knows in which order headers, config, class and sizes are found out. It refuses to know what is made of them: a plan,
a table, or a running model.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from airstream.checkpoint.formats import has_weights, open_checkpoint
from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.locate import locate
from airstream.checkpoint.stored import CheckpointIndex
from airstream.errors import ArgumentError, CheckpointError, UnsupportedError
from airstream.layout.byte_plan import read_specs
from airstream.layout.imagined import imagine
from airstream.layout.kept_packed import keep_packed
from airstream.layout.parts import divide
from airstream.loading.arguments import adopt
from airstream.loading.asked import settled
from airstream.loading.build import build_model
from airstream.loading.compressed import imagine_compressed
from airstream.loading.gather import gather_facts, needs_staging
from airstream.loading.machine import THIS_MACHINE, Machine, Question, check_machine, request_for
from airstream.loading.options import FAST, LoadOptions, check_count, parse_max_memory
from airstream.loading.prepared import Prepared
from airstream.plan.policy import PROMPT_TOKENS
from airstream.transfer.packing import packing_of

STEPS = ("finding the checkpoint", "reading headers", "building the model", "planning")
"""The steps of `prepare`, in the order in which it begins them."""

DEFAULTS: Mapping[str, Any] = {option.name: option.default for option in fields(LoadOptions)}
_PLAN_DEFAULTS: Mapping[str, Any] = {**DEFAULTS, "machine": THIS_MACHINE, "prompt_tokens": None}


def prepare_for_planning(
    name: str | os.PathLike[str],
    options: Mapping[str, Any],
    machine: Machine = THIS_MACHINE,
    prompt_tokens: int | None = None,
) -> Prepared:
    """The sizes of a model and what is asked of the planner, weights or not. Arguments as `AutoModel.plan`."""
    check_machine(machine)
    given = {key: value for key, value in options.items() if key in DEFAULTS}
    foreign = {key: value for key, value in options.items() if key not in DEFAULTS}
    known = LoadOptions(**adopt(foreign, given, _PLAN_DEFAULTS))
    if prompt_tokens is not None:
        check_count("prompt_tokens", prompt_tokens, at_least=1)
        if prompt_tokens > (known.max_context or prompt_tokens):
            raise ArgumentError(
                f"a prompt of prompt_tokens={prompt_tokens} does not fit into max_context={known.max_context}"
            )
    return prepare(name, known, with_weights=False, machine=machine, prompt_tokens=prompt_tokens or PROMPT_TOKENS)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Without Python's cyclic garbage collector: a hundred thousand small objects that stay would wake it again and
    again, and it would look at all of torch and transformers, and find nothing. That is a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collecting()
def prepare(
    name: str | os.PathLike[str],
    options: LoadOptions,
    with_weights: bool = True,
    machine: Machine = THIS_MACHINE,
    prompt_tokens: int = PROMPT_TOKENS,
    begin: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Find out everything about the model `name`. `begin` is told each of `STEPS` but the first."""
    device = machine.device(options.device)
    parse_max_memory(options.max_memory, device)  # a mistake in it is told before anything is downloaded
    folder, gguf = locate(name, options.hub, options.gguf_file, options.trust_remote_code, with_weights)
    begin(STEPS[1])
    index: CheckpointIndex | None
    if gguf is not None:
        if options.variant is not None:
            raise ArgumentError(f"variant={options.variant!r} is of safetensors: name the GGUF file with gguf_file=...")
        index = GgufIndex.open(gguf)
    else:
        has_any = with_weights or has_weights(folder, options.variant)
        index = open_checkpoint(folder, variant=options.variant) if has_any else None
    if index is not None and not index:
        raise CheckpointError(f"{gguf or folder} has no tensors: its files of weights are empty. Download it again")
    begin(STEPS[2])
    imagined = None
    if not with_weights:
        options = settled(options, folder, gguf, device)
    if options.compression is not None and not with_weights:  # what is loaded has been packed
        if gguf is not None:
            raise UnsupportedError(f"{gguf} is packed already, as GGUF: leave compression={options.compression!r} out")
        imagined = imagine_compressed(folder, options, index)
        index = imagined.index if imagined is not None else index
    has_fp8 = machine.card.has_fp8 if machine.card is not None else None
    built = build_model(folder, options, device, index, imagined, has_fp8=has_fp8)
    model, dtype, quantizer = built.model, built.dtype, built.quantizer
    begin(STEPS[3])
    index = built.checkpoint or imagine(model)
    specs = read_specs(model, index, dtype, quantizer)
    parts = divide(model, keep_packed(model, specs) if options.kernels == FAST else specs)
    packing = packing_of(device)
    facts = gather_facts(os.fspath(name), folder, built, parts, device, packing, options.layers_per_batch)
    facts = replace(facts, num_tensors=len(index))
    staged = device.type != "cpu" or needs_staging(parts, packing)
    request = request_for(Question(options, machine, folder, device, staged, prompt_tokens), facts)
    return Prepared(options, folder, device, dtype, model, index, parts, facts, staged, request, quantizer)
