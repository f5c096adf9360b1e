"""These describe what the names and storages in a pickle of weights stand for: tensors, made of checked numbers.

Nothing here looks a name up, nothing has the size that a file claims, and nothing that a file made is printed, hashed
or compared: a tuple of two tuples, each of which is the same two tuples, and so on, is small and takes for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from airstream.checkpoint.stored import ITEM_BYTES
from airstream.reporting.units import counted

MAX_DIMENSIONS = 64

STORAGE_DTYPES: Mapping[str, str] = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
"""safetensors' name of what each class of storage holds."""

TORCH_TYPES: Mapping[str, str] = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Name:
    """A name of Python's that the file mentions. It is never looked up."""

    full: str


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """A run of elements outside the pickle: all of storage `key`, or what begins at its byte `start`."""

    key: str
    dtype: str
    total_elements: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """Elements of a storage, as in `torch.as_strided`: offset and strides count elements of `dtype`."""

    storage: PickledStorage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def described_storage(kind: Any, cls: Any, key: Any, _: Any, elements: Any, *view: Any) -> PickledStorage:
    """What `torch.save` notes of a storage: "storage", its class, key, device, elements, and in old files a view."""
    if type(kind) is not str or kind != "storage" or not isinstance(cls, Name) or type(key) is not str:
        raise ValueError("a storage was expected")
    dtype = STORAGE_DTYPES.get(cls.full.rpartition(".")[2])
    if dtype is None:
        raise ValueError(f"storages of type {cls.full} are not known")
    item_bytes = ITEM_BYTES[dtype]
    first, count = 0, elements
    if view and view[0] is not None:
        if type(view[0]) is not tuple or len(view[0]) != 3:
            raise ValueError("a view of a storage was expected")
        _, first, count = view[0]
    _check_whole((elements, first, count))
    if first + count > elements:
        raise ValueError(f"a view of {counted(count, 'element')} from {first:,} of {elements:,}")
    return PickledStorage(key, dtype, elements, first * item_bytes, count * item_bytes)


def make(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What stands for calling `function`."""
    make = MAKERS.get(function.full) if isinstance(function, Name) else None
    if make is None:
        raise ValueError(f"{_shown(function)} is called")
    return make(*arguments)


def _made_by(function: Any, _: Any = None, arguments: Any = None, *__: Any) -> Any:
    """What `function` makes of a subclass of Tensor."""
    if type(arguments) is not tuple or not isinstance(function, Name) or function.full not in TENSOR_MAKERS:
        raise ValueError("a tensor of a class of its own that is not made as one")
    return TENSOR_MAKERS[function.full](*arguments)


def _shown(value: Any) -> str:
    """A value in words of its own length: it may be a name, and whatever else it is is not looked at."""
    return value.full if isinstance(value, Name) else f"a value of type {type(value).__name__}"


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *others: Any) -> PickledTensor:
    _check_plain(others[2:])  # behind whether it needs gradients, and hooks
    return _described_tensor(storage, None, offset, shape, stride)


def _typed_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *others: Any) -> PickledTensor:
    _, _, dtype, *rest = others  # whether it needs gradients, hooks
    _check_plain(rest)
    name = TORCH_TYPES.get(dtype.full.removeprefix("torch.")) if isinstance(dtype, Name) else None
    if name is None:
        raise ValueError(f"{_shown(dtype)} is not a type of element")
    return _described_tensor(storage, name, offset, shape, stride)


def _described_tensor(storage: Any, dtype: str | None, offset: Any, shape: Any, stride: Any) -> PickledTensor:
    if not isinstance(storage, PickledStorage):
        raise TypeError("a tensor without a storage")
    if type(shape) is not tuple or type(stride) is not tuple or not len(shape) == len(stride) <= MAX_DIMENSIONS:
        raise ValueError("a tensor whose shape and strides do not belong together")
    _check_whole((offset, *shape, *stride))
    return PickledTensor(storage, dtype or storage.dtype, offset, shape, stride)


def _check_plain(metadata: Sequence[Any]) -> None:
    """torch notes there what it does to a tensor's elements whenever they are looked at: negates or conjugates them."""
    marks = metadata[0] if metadata and type(metadata[0]) is dict else {}
    if any(marks.get(mark) for mark in ("neg", "conj")):
        raise ValueError(
            "a tensor whose elements are to be negated or conjugated: save it after .resolve_neg().resolve_conj()"
        )


def _check_whole(values: tuple[Any, ...]) -> None:
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in values):
        raise ValueError("a size, offset or stride that is none")


def _same(first: Any = None, *_: Any) -> Any:
    """A parameter is its tensor; a `torch.Size` is its tuple."""
    return first


def _nothing(*_: Any) -> None:
    """What does not matter: a device, bytes beside the weights."""


def _dictionary(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    if type(pairs) not in (list, tuple) or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("pairs of keys and values were expected")
    return {key: value for key, value in pairs if type(key) in (str, int)}


TENSOR_MAKERS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
}

MAKERS: Mapping[str, Callable[..., Any]] = {
    **TENSOR_MAKERS,
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _made_by,
    "torch.Size": _same,
    "torch.device": _nothing,
    "_codecs.encode": _nothing,
}

KNOWN_NAMES: Mapping[str, Name] = {
    name: Name(name)
    for name in (
        *MAKERS,
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        *(f"torch.{name}" for name in TORCH_TYPES),
        *(f"{module}.{name}" for module in ("torch", "torch.cuda", "torch.storage") for name in STORAGE_DTYPES),
    )
}
