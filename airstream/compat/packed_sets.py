"""This says which tensors a packed weight consists of, and how many numbers each of them has for the others.

Whoever computes with them finds a missing one by an assertion, a wrong one in the middle of a pass, and reads beyond
the end of one that is too short. What a header says of them is enough to know, but for bitsandbytes, which says beside
each weight how many numbers share a scale. It knows the names that formats give. It refuses to know dimensions
(`packed_shapes`), and what a config says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from airstream.checkpoint.stored import StoredTensor
from airstream.errors import CheckpointError

__all__ = ["check_said_sets", "check_sets"]

Index = Mapping[str, StoredTensor]

STATE = ".quant_state.bitsandbytes__"
NESTED = (".nested_absmax", ".nested_quant_map")
ENDS = (".absmax", ".quant_map", *NESTED)
"""Of bitsandbytes' 4 bits, behind the name of the weight."""

MAX_STATE_BYTES = 1 << 14
"""Of what bitsandbytes says beside a weight. That has less than 300."""

SCALES = ("BF16", "F16", "F32", "F64")
"""What scales of compressed-tensors' integers may be."""

BLOCKS = tuple(1 << power for power in range(5, 13))
"""How many numbers may share a scale there."""


def check_sets(method: str, index: Index) -> None:
    """Refuse a checkpoint quantised by `method` if a tensor of a packed weight is missing, or has another length.

    Raises:
        CheckpointError: the message names the file and the tensor.
    """
    fault = next(FAULTS.get(method, _integers)(index), None)
    if fault is not None:
        raise CheckpointError(f"{fault}: it is damaged. Download the checkpoint again")


def check_said_sets(said: Mapping[str, Any], index: Index) -> None:
    """Refuse a checkpoint of torchao that lacks a part of a weight which the headers of its files, `said`, describe.

    Raises:
        CheckpointError: the message names the file and the tensor.
    """
    for weight, text in said.items():
        try:
            described = json.loads(text)
        except (TypeError, ValueError):
            continue
        if isinstance(described, Mapping) and (names := described.get("_tensor_data_names")):
            _check_described(weight, [str(name) for name in names], described.get("_data"), index)


def _check_described(weight: str, names: list[str], data: Any, index: Index) -> None:
    module, _, leaf = weight.rpartition(".")
    keys = {name: f"{module}._{leaf}_{name}" for name in names}
    parts = {name: index[key] for name, key in keys.items() if key in index}
    if not parts:
        return  # of another part of the checkpoint, or under another name
    for name, key in keys.items():
        if name not in parts:
            raise CheckpointError(_missing(next(iter(parts.values())), key) + ": download the checkpoint again")
    block = data.get("block_size") if isinstance(data, Mapping) else None
    numbers, scales = parts.get("qdata"), parts.get("scale")
    if numbers is None or scales is None or block is None:
        return
    if not isinstance(block, list) or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(
            f"{numbers.file}: block_size of {weight!r} in the header's __metadata__ is {str(block)[:40]}, which is no "
            "list of sizes: it is damaged. Download the checkpoint again"
        )
    if len(block) != len(numbers.shape):
        return  # numbers in the order of a kernel
    wanted, turned = (
        math.prod(-(-length // size) for length, size in zip(shape, block, strict=True))
        for shape in (numbers.shape, numbers.shape[::-1])
    )
    if math.prod(scales.shape) not in (wanted, turned):  # the model tells a turned one
        raise CheckpointError(_lengths(scales, wanted, numbers) + ": it is damaged. Download the checkpoint again")


def _type(stored: StoredTensor, wanted: str) -> str:
    return f"{stored.file}: tensor {stored.name!r} has numbers of type {stored.dtype}, and not {wanted}"


def _missing(present: StoredTensor, name: str) -> str:
    return f"{present.file}: tensor {name!r}, of the same packed weight as {present.name!r}, is missing"


def _lengths(stored: StoredTensor, wanted: int | str, other: StoredTensor) -> str:
    return (
        f"{stored.file}: tensor {stored.name!r} {stored.dtype} {list(stored.shape)} should have {wanted} numbers for "
        f"{other.name!r} {list(other.shape)}"
    )


def _bitsandbytes(index: Index) -> Iterator[str]:
    weights: dict[str, dict[str, StoredTensor]] = {}
    for key, stored in index.items():
        stem, found, _ = key.partition(STATE)
        end = STATE if found else next((end for end in ENDS if key.endswith(end)), None)
        if end is not None:
            weights.setdefault(stem if found else key.removesuffix(end), {})[end] = stored
        elif key.endswith(".SCB"):
            yield from _eight_bits(stored, key.removesuffix("SCB") + "weight", index)
        elif stored.dtype == "I8" and key.endswith(".weight") and f"{key}.absmax" not in index:
            name = key.removesuffix("weight") + "SCB"
            yield from () if name in index else [_missing(stored, name)]
    for weight, parts in weights.items():
        yield from _four_bits(weight, parts, index.get(weight))


def _eight_bits(scales: StoredTensor, name: str, index: Index) -> Iterator[str]:
    numbers = index.get(name)
    if numbers is None:
        yield _missing(scales, name)
    elif numbers.shape and math.prod(scales.shape) not in (numbers.shape[0], numbers.shape[-1]):  # it may be turned
        yield _lengths(scales, numbers.shape[0], numbers)
    elif scales.dtype != "F32":
        yield _type(scales, "F32")


def _four_bits(weight: str, parts: Mapping[str, StoredTensor], numbers: StoredTensor | None) -> Iterator[str]:
    present = numbers if numbers is not None else next(iter(parts.values()))
    scales = parts.get(".absmax")
    is_nested = any(end in parts for end in NESTED) or (scales is not None and scales.dtype == "U8")
    needed = (".absmax", ".quant_map", STATE, *(NESTED if is_nested else ()))
    lost = [""] if numbers is None else []
    lost += [end for end in needed if end not in parts]
    if lost or numbers is None or scales is None:
        yield from (_missing(present, f"{weight}{'.quant_state' if end == STATE else end}") for end in lost)
        return
    if is_nested and scales.dtype != "U8":
        yield _type(scales, "U8")
    yield from (_type(parts[end], "F32") for end in NESTED if is_nested and parts[end].dtype != "F32")
    if not _may_share(2 * numbers.nbytes, scales):
        yield _lengths(scales, "one of every 64", numbers)
    if is_nested and not _may_share(math.prod(scales.shape), nested := parts[NESTED[0]]):
        yield _lengths(nested, "one of every 256", scales)
    yield from _unlike_state(parts[STATE], numbers, scales)


def _unlike_state(state: StoredTensor, numbers: StoredTensor, scales: StoredTensor) -> Iterator[str]:
    """A fault if `state`, which is JSON, says that others than these are the `scales` of `numbers`."""
    where = f"{state.file}: tensor {state.name!r}"
    try:
        said = _said_beside(state)
    except ValueError as error:
        yield f"{where} {state.dtype} {list(state.shape)} describes no weight: {error}"
        return
    if said is None:
        return
    block = said.get("blocksize")
    if type(block) is not int or block not in BLOCKS:
        yield f"{where} has blocksize={str(block)[:100]}, and none of {', '.join(map(str, BLOCKS))}"
    elif math.prod(scales.shape) != (wanted := -(-2 * numbers.nbytes // block)):
        yield f"{_lengths(scales, wanted, numbers)}, as {state.name!r} says blocksize={block}"


def _said_beside(state: StoredTensor) -> Mapping[str, Any] | None:
    """What `state` says; None if its file is not there, as where a plan is made from headers alone.

    Raises:
        ValueError: it is no object of JSON.
    """
    if state.dtype != "U8" or state.nbytes > MAX_STATE_BYTES:
        raise ValueError("it is no short text in U8")
    try:
        with state.file.open("rb") as file:
            file.seek(state.offset)
            raw = file.read(state.nbytes)
    except OSError:
        return None
    try:
        said = json.loads(raw)
    except (RecursionError, UnicodeDecodeError):  # a text as small as this takes no memory
        raise ValueError("it is no JSON") from None
    if not isinstance(said, Mapping):
        raise ValueError("it is no object of JSON")
    return said


def _may_share(count: int, scales: StoredTensor) -> bool:
    """Whether `count` numbers may have so many scales."""
    return math.prod(scales.shape) in {-(-count // block) for block in BLOCKS}


def _integers(index: Index) -> Iterator[str]:
    """GPTQ: the group of each input."""
    for key, stored in index.items():
        qzeros = index.get(key.removesuffix("g_idx") + "qzeros") if key.endswith(".g_idx") else None
        scales = index.get(key.removesuffix("g_idx") + "scales") if qzeros is not None else None
        qweight = index.get(key.removesuffix("g_idx") + "qweight") if scales is not None else None
        if qzeros is None or scales is None or qweight is None or len(qweight.shape) != 2 or len(qzeros.shape) != 2:
            continue
        bits = qzeros.shape[1] * 32 // max(math.prod(scales.shape[1:]), 1)
        inputs = qweight.shape[0] * 32 // max(bits, 1)
        if stored.shape != (inputs,):
            yield _lengths(stored, inputs, qweight)


def _eights(index: Index) -> Iterator[str]:
    """FP8: transformers would take scales that are not there for ones."""
    for key, stored in index.items():
        if stored.dtype.startswith("F8_") and key.endswith(".weight"):
            scale = f"{key}_scale_inv"
            yield from () if scale in index or f"{key}_scale" in index else [_missing(stored, scale)]
        elif key.endswith(".weight_scale_inv") and (weight := key.removesuffix("_scale_inv")) not in index:
            yield _missing(stored, weight)


def _compressed(index: Index) -> Iterator[str]:
    """Integers, in words of 32 bits: these alone have a shape."""
    for key, stored in index.items():
        if stored.dtype == "I32" and key.endswith(".weight_packed"):
            others = (key.removesuffix("packed") + end for end in ("scale", "shape"))
            yield from (_missing(stored, other) for other in others if other not in index)
        elif key.endswith(".weight_shape"):
            packed, scales = (index.get(key.removesuffix("shape") + end) for end in ("packed", "scale"))
            yield from [_missing(stored, key.removesuffix("shape") + "packed")] if packed is None else ()
            if packed is not None and packed.dtype != "I32":
                yield _type(packed, "I32")
            if packed is not None and stored.shape != (len(packed.shape),):
                yield _lengths(stored, len(packed.shape), packed)
            if scales is not None and scales.dtype not in SCALES:
                yield _type(scales, " or ".join(SCALES))


FAULTS: Mapping[str, Callable[[Index], Iterator[str]]] = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _eights,
    "compressed-tensors": _compressed,
}
"""By format, what is wrong with the packed weights of a checkpoint."""
