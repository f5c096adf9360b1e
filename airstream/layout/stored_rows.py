"""This lets modules multiply with weights of quantised checkpoints as they are stored, where there are kernels.

A weight of such a format is a few tensors: small numbers, and scales. Here each becomes two of a `PackedLinear`,
whatever a format calls them, and what is the same for all weights of the format is left out.

It knows the formats of `compat.quantising`, by the names of their tensors. It refuses to know how rows are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.codecs.products import MAX_COLUMNS, STEP, RowFormat
from airstream.compat.gguf import conversion_for
from airstream.compat.packed_linear import PackedLinear
from airstream.compat.plain_formats import is_plain_int4
from airstream.layout.pieces import TORCH_DTYPES

__all__ = ["hold_stored_rows"]

SCALES = ("F32", "BF16")
"""What kernels read scales in."""


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """One format.

    Attributes:
        kind: the kernel.
        bits: of a number.
        dtype: of the tensor that numbers are in, as safetensors calls it.
        shape: of that tensor, for a weight of some rows and columns.
        scale_shapes: that of its scales may be one of these, for rows, columns and the numbers that share one.
        numbers, scales: how the names of its tensors end, behind that of the module.
        others: those that say nothing of their own.
        is_meant: whether a checkpoint's settings are those that the kernel computes.
    """

    kind: str
    bits: int
    dtype: str
    shape: Callable[[int, int], Shape]
    scale_shapes: Callable[[int, int, int], tuple[Shape, ...]]
    numbers: str
    scales: str
    others: tuple[str, ...]
    is_meant: Callable[[Mapping[str, Any]], bool]


def _is_nf4(settings: Mapping[str, Any]) -> bool:
    is_plain = not settings.get("bnb_4bit_use_double_quant")
    return bool(settings.get("load_in_4bit") and settings.get("bnb_4bit_quant_type") == "nf4" and is_plain)


def _is_int8(settings: Mapping[str, Any]) -> bool:
    kind = (settings.get("quant_type") or {}).get("default") or {}
    return kind.get("_type") == "Int8WeightOnlyConfig" and not (kind.get("_data") or {}).get("group_size")


def _is_fp8(settings: Mapping[str, Any]) -> bool:
    rows, columns = settings.get("weight_block_size") or (0, 1)
    return bool(rows == columns)


NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"


def _squares(rows: int, columns: int, group: int) -> tuple[Shape, ...]:
    """Of fp8. transformers shares scales evenly among rows, which is another thing where the last are fewer."""
    down = -(-rows // group)
    is_even = rows % down == 0
    return () if is_even and rows != down * group else ((down, columns // group),)


LAYOUTS: Mapping[str, Layout] = {
    "bitsandbytes": Layout(
        "nf4",
        4,
        "U8",
        lambda rows, columns: (rows * columns // 2, 1),
        lambda rows, columns, group: ((rows * columns // group,),),
        ".weight",
        ".weight.absmax",
        (".weight.quant_map", NF4_STATE),
        _is_nf4,
    ),
    "torchao": Layout(
        "int8",
        8,
        "I8",
        lambda rows, columns: (rows, columns),
        lambda rows, columns, group: ((rows, columns // group), (rows,)),
        "._weight_qdata",
        "._weight_scale",
        ("._weight_zero_point",),
        _is_int8,
    ),
    "compressed-tensors": Layout(
        "int4",
        4,
        "I32",
        lambda rows, columns: (rows, columns // 8),
        lambda rows, columns, group: ((rows, columns // group),),
        ".weight_packed",
        ".weight_scale",
        (".weight_shape",),
        is_plain_int4,
    ),
    "fp8": Layout(
        "fp8",
        8,
        "F8_E4M3",
        lambda rows, columns: (rows, columns),
        _squares,
        ".weight",
        ".weight_scale_inv",
        (),
        _is_fp8,
    ),
}
"""By what `config.json` calls the method."""


def hold_stored_rows(
    model: PreTrainedModel, index: CheckpointIndex, method: str, settings: Mapping[str, Any]
) -> CheckpointIndex | None:
    """`index` with two tensors for each packed weight, and `model`, on the meta device, with modules that hold them.

    Args:
        model: its linear modules are `PackedLinear`.
        method, settings: what the checkpoint's config says of its quantisation.

    Returns:
        None, and `model` as it was, if there are no kernels for the format, or for one of its weights.
    """
    layout = LAYOUTS.get(method)
    if layout is None or not layout.is_meant(settings):
        return None
    conversion, modules = conversion_for(model, index), dict(model.named_modules())
    tensors, held = dict(index), {}
    for stem, found in _stems(layout, index).items():
        name, pattern = conversion.rename(f"{stem}.weight")
        module = modules.get(name.rpartition(".")[0])
        numbers, scales = tensors.pop(f"{stem}{layout.numbers}", None), tensors.pop(f"{stem}{layout.scales}")
        if pattern is not None or not isinstance(module, PackedLinear) or numbers is None or module in held:
            return None
        if found - {".bias"} != {layout.numbers, layout.scales, *layout.others}:
            return None  # one is missing, or one more says something else of the weight
        how = _format_of(layout, module, numbers, scales)
        if how is None:
            return None
        for end in layout.others:
            del tensors[f"{stem}{end}"]
        name = name.removesuffix("weight")
        tensors[f"{name}packed"] = replace(numbers, dtype="U8", shape=(module.out_features, how.row_bytes))
        tensors[f"{name}packed_scale"] = scales
        held[module] = how, numbers, scales
    if layout.numbers != ".weight" and any(key.endswith(layout.numbers) for key in tensors):
        return None  # its scales are missing, which whoever puts it together says
    for module, (how, numbers, scales) in held.items():
        stored_as = f"{numbers.file}: tensor {numbers.name!r}"
        module.hold(how, stored_as, scales.shape, TORCH_DTYPES[scales.dtype])
    return CheckpointIndex(tensors) if held else None


def _stems(layout: Layout, index: CheckpointIndex) -> dict[str, set[str]]:
    """Beginnings of the names of packed weights, and how the names of all tensors go on that begin so."""
    stems: dict[str, set[str]] = {
        key.removesuffix(layout.scales): set() for key in index if key.endswith(layout.scales)
    }
    for key in index:
        for place in [place for place, letter in enumerate(key) if letter == "." and key[:place] in stems]:
            stems[key[:place]].add(key[place:])
    return stems


def _format_of(layout: Layout, module: PackedLinear, numbers: StoredTensor, scales: StoredTensor) -> RowFormat | None:
    """How the rows of a weight of `module` are stored; None if kernels do not take it so."""
    rows, columns = module.out_features, module.in_features
    row_bytes, rest = divmod(columns * layout.bits, 8)
    if rest or columns > MAX_COLUMNS or numbers.dtype != layout.dtype or scales.dtype not in SCALES:
        return None
    if numbers.shape != layout.shape(rows, columns):
        return None
    across = math.prod(scales.shape) // rows if layout.kind != "fp8" else scales.shape[-1] if scales.shape else 0
    group = columns // max(across, 1)
    if group == 0 or group % STEP or columns % group:
        return None
    how = RowFormat(layout.kind, columns, row_bytes, group)
    return how if scales.shape in layout.scale_shapes(rows, columns, group) else None
