"""This makes quantised weights dense by kernels of ours, where they give the bits that the library would give.

transformers and compressed-tensors go over every number several times, in float32. A kernel writes it
once, and takes no memory besides. Each number is one product, rounded once, so that there is but one right result. What
the kernels do not take is left to the library.

It knows the operations of transformers. It refuses to know where weights lie, and how kernels work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from typing import Any

import torch

from airstream.codecs.products import MAX_COLUMNS, STEP, RowFormat, StoredRows, make_dense
from airstream.compat.plain_formats import LIBRARY_ITEM_BYTES

__all__ = ["aimed", "expand_with_kernels"]

WRITTEN = (torch.float32, torch.bfloat16)
"""Dtypes that kernels write, and read scales in."""

INT4_KEYS = {"weight_packed", "weight_scale", "weight_shape"}

Tensors = Mapping[str, "list[torch.Tensor] | torch.Tensor"]


def expand_with_kernels(mapping: Iterable[Any]) -> None:
    """Let those operations of `mapping`, a model's renames and converters, use kernels that make weights dense.

    They are for the CPU, and on the meta device do as they do there.
    """
    for operation in (each for entry in mapping for each in getattr(entry, "operations", ())):
        if type(operation).__name__ in BY_KERNEL:
            method, with_kernel = BY_KERNEL[type(operation).__name__]
            setattr(operation, method, partial(with_kernel, getattr(operation, method)))


def aimed(operation: Any, out: torch.Tensor) -> Any:
    """`operation`, or a copy of it which writes to `out` if that is what a kernel is to write."""
    method, _ = BY_KERNEL.get(type(operation).__name__, ("", None))
    if method not in vars(operation):
        return operation
    operation = copy(operation)
    setattr(operation, method, partial(getattr(operation, method), out=out))
    return operation


def _of_fp8(
    library: Callable[..., torch.Tensor],
    quantized: torch.Tensor,
    scales: torch.Tensor,
    output_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Fp8Dequantize._dequantize_one` of transformers: e4m3 (rows, columns), times the scale of its square."""
    dtype = output_dtype or scales.dtype
    if quantized.ndim == scales.ndim == 2 and quantized.dtype == torch.float8_e4m3fn:
        group, rest = divmod(quantized.shape[1], scales.shape[1])
        is_square = not rest and quantized.shape[0] == scales.shape[0] * group
        how = RowFormat("fp8", quantized.shape[1], quantized.shape[1], group)
        if is_square and _is_taken(how, scales, dtype):
            return _dense(StoredRows(how, len(quantized), quantized.contiguous(), scales.contiguous()), dtype, out)
    return library(quantized, scales, output_dtype=output_dtype)


def _of_int4(
    library: Callable[..., dict[str, Any]], input_dict: Tensors, out: torch.Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """`CompressedTensorsDequantize.convert` of transformers: numbers from -8 to 7, times the scale of their group."""
    single = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
    target = kwargs["model"].get_parameter(kwargs["full_layer_name"])
    if single.keys() == INT4_KEYS and target.ndim == single["weight_scale"].ndim == 2:
        packed, scales, (rows, columns) = single["weight_packed"], single["weight_scale"], target.shape
        group, rest = divmod(columns, max(scales.shape[1], 1))
        how = RowFormat("int4", columns, columns // 2, group)
        is_whole = not rest and 2 * packed.nbytes == rows * columns and len(scales) == rows
        if is_whole and _is_taken(how, scales, scales.dtype):
            dense = _dense(StoredRows(how, rows, packed.contiguous(), scales.contiguous()), scales.dtype, out)
            return {kwargs["full_layer_name"]: dense.to(target.dtype)}
    taken = torch.empty(target.numel() * LIBRARY_ITEM_BYTES, dtype=torch.uint8, device="meta")  # for whoever counts
    converted = library(input_dict, **kwargs)
    del taken
    return converted


def _is_taken(how: RowFormat, scales: torch.Tensor, dtype: torch.dtype) -> bool:
    is_whole = how.group > 0 and how.group % STEP == 0 and how.columns <= MAX_COLUMNS
    return is_whole and scales.dtype in WRITTEN and dtype in WRITTEN


def _dense(weight: StoredRows, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    """All of `weight`, in `dtype`: `out`, if it has room for it."""
    shape = (weight.rows, weight.format.columns)
    if out is None or (out.shape, out.dtype) != (shape, dtype) or not out.is_contiguous():
        out = torch.empty(shape, dtype=dtype, device=weight.numbers.device)
    make_dense(weight, 0, out)
    return out


BY_KERNEL: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "Fp8Dequantize": ("_dequantize_one", _of_fp8),
    "CompressedTensorsDequantize": ("convert", _of_int4),
}
"""By transformers' name of an operation: what of it makes weights dense, and what does that with a kernel."""
