"""This says which bytes of which file make which tensor of the model.

A `TensorSpec` is the byte plan of one tensor: the pieces of files it consists of. Most tensors are one piece. Where
transformers merges, splits or reorders checkpoint tensors while loading (all experts of a layer into one tensor, say),
its own converters are run once on tensors of row numbers: what comes out says which row of which source lies where,
so that at run time there is nothing left to do but read. Where a converter does more than move rows (it transposes, or
computes), its sources are read raw and it runs on them each time: a `Conversion`.

It knows nothing of devices, budgets or the order of execution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from airstream.checkpoint.partial import kept_layers
from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.compat.assembled import is_packed_alone
from airstream.compat.blame import blamed_on
from airstream.compat.gguf import conversion_for
from airstream.compat.quantizer import Quantizer
from airstream.compat.weights import DtypePlan, may_be_missing, natural_order, tied_names
from airstream.errors import CheckpointError
from airstream.layout.pieces import dtype_of, plain_spec
from airstream.layout.tensors import TensorSpec
from airstream.layout.tracing import KnownConversions, trace
from airstream.reporting.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["read_specs"]


def read_specs(
    model: PreTrainedModel,
    index: CheckpointIndex,
    dtype: torch.dtype,
    quantizer: Quantizer | None = None,
    *,
    faults: list[CheckpointError] | None = None,
    may_lack: bool = False,
) -> dict[str, TensorSpec]:
    """The byte plan of every tensor of `model` that the checkpoint provides, tied names included.

    Args:
        model: on the meta device.
        dtype: what floating-point parameters are to be, as `from_pretrained(dtype=...)`.
        quantizer: the quantizer of the checkpoint, if it is quantised.
        faults: takes all that is wrong, instead of the first of it being raised.
        may_lack: tensors may be missing.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the model.
    """
    where = next((str(tensor.file.parent) for tensor in index.values()), "the checkpoint")
    with blamed_on(f"the tensors of {where} cannot be converted as its config.json says"):
        return _read_specs(model, index, dtype, quantizer, faults, may_lack)


def _read_specs(
    model: PreTrainedModel,
    index: CheckpointIndex,
    dtype: torch.dtype,
    quantizer: Quantizer | None,
    faults: list[CheckpointError] | None,
    may_lack: bool,
) -> dict[str, TensorSpec]:
    targets = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    dtype_plan = DtypePlan(model, dtype)
    wanted = {name: dtype_plan(name, tensor.dtype) for name, tensor in targets.items()}
    specs: dict[str, TensorSpec] = {}
    if quantizer is not None:
        with _noting(faults):
            quantizer.check(index)
    conversion = conversion_for(model, index, quantizer)
    converted: dict[str, list[tuple[str, str]]] = {}
    sizes = cache(lambda: tuple(_sizes(model.config.to_dict())))  # once: all tensors may be of another model
    for key in natural_order(index):
        name, pattern = conversion.rename(key)
        if name not in targets:
            continue  # weights of parts that this class does not have (a multi-token-prediction head, say)
        if pattern is None:
            stored = index[key]
            with _noting(faults):
                _check_shape(name, stored, tuple(targets[name].shape), sizes)
            specs[name] = plain_spec(name, stored, conversion.source_dtype(None, dtype_of(stored), wanted[name]))
        else:
            converted.setdefault(name, []).append((key, pattern))
    known = KnownConversions()
    for name, sources in converted.items():
        with _noting(faults):
            for spec in trace(conversion, name, sources, index, targets, wanted, known):
                specs[spec.name] = spec
    if quantizer is not None:
        with _noting(faults):
            _check_packed(model, specs)
    _resolve_ties(model, specs, targets)
    if not may_lack:
        _check_complete(model, specs, targets, faults, index)
    return specs


@contextmanager
def _noting(faults: list[CheckpointError] | None) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        if faults is None:
            raise
        faults.append(error)


def _check_shape(
    name: str,
    stored: StoredTensor,
    expected: tuple[int, ...],
    sizes: Callable[[], Sequence[tuple[str, int]]],
) -> None:
    if stored.shape == expected:
        return
    wrong = {size for size, own in zip(expected, stored.shape, strict=False) if size != own} or set(expected)
    said = ", ".join(f"{field}={size}" for field, size in sizes() if size in wrong)
    raise CheckpointError(
        f"{stored.file}: tensor {stored.name!r} has shape {list(stored.shape)}, the model's {name!r} needs "
        f"{list(expected)}: config.json{f' ({said[:200]})' if said else ''} and the weights do not belong together"
    )


def _check_packed(model: PreTrainedModel, specs: Mapping[str, TensorSpec]) -> None:
    """Refuse weights that are stored as they are where the config says that they are packed."""
    for name, parameter in model.named_parameters():
        if name in specs and specs[name].made_by is None and is_packed_alone(parameter):
            raise CheckpointError(
                f"{specs[name].pieces[0].file}: tensor {name!r} is not packed, and quantization_config in config.json "
                "does not list it among those that are not (llm_int8_skip_modules)"
            )


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every number of a config that a tensor may have its size from, with its name."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _sizes(value)
        elif type(value) is int and not name.endswith("_id"):
            yield name, value


def _resolve_ties(model: PreTrainedModel, specs: dict[str, TensorSpec], targets: Mapping[str, torch.Tensor]) -> None:
    """Give a name without weights of its own the bytes of the name it is tied to, whichever of the two is stored."""
    groups: dict[str, list[str]] = {}
    for name, source in tied_names(model).items():
        groups.setdefault(source, [source]).append(name)
    for names in groups.values():
        present = next((specs[name] for name in names if name in specs), None)
        for name in names:
            if present is not None and name not in specs and name in targets:
                specs[name] = replace(present, name=name)


def _check_complete(
    model: PreTrainedModel,
    specs: Mapping[str, TensorSpec],
    targets: Mapping[str, torch.Tensor],
    faults: list[CheckpointError] | None,
    index: CheckpointIndex,
) -> None:
    optional = [re.compile(pattern) for pattern in may_be_missing(model)]
    missing = [name for name in targets if name not in specs and not any(p.search(name) for p in optional)]
    if faults is not None:
        faults += [CheckpointError(f"tensor {name!r} {list(targets[name].shape)} is missing") for name in missing]
    elif missing:
        folder = next((tensor.file.parent for tensor in index.values()), None)
        where = f" in {folder}" if folder is not None else ""
        if folder is not None and (kept := kept_layers(folder)):
            raise CheckpointError(
                f"{folder} is a part of a model, its layers {kept[0]} to {kept[1] - 1} alone (`airstream repack "
                "--layers`), which cannot run by itself: name the checkpoint that it was made of"
            )
        names = ", ".join(repr(name) for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"the checkpoint{where} lacks {len(missing)} of the {counted(len(targets), 'tensor')} of "
            f"{type(model).__name__}: {names}. {_remedy(model)}"
        )


def _remedy(model: PreTrainedModel) -> str:
    """What to do about weights that a checkpoint has not: it may be whole, and another model's."""
    saved = model.config.architectures or []
    if saved and type(model).__name__ not in saved:
        return f"It was saved from {', '.join(map(str, saved))}: leave model_class= out, or name that"
    return "Download it again, or check that config.json belongs to it"
