"""This imagines a checkpoint that is not there: what `save_pretrained` would write of a model on the meta device.

Lets everything that plans work from a config alone. It knows how the safetensors library orders and aligns what it
writes, so that offsets are those of the real file; writes and opens nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from airstream.checkpoint.names import SINGLE_FILE
from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.compat.weights import stored_tensors
from airstream.layout.pieces import TORCH_DTYPES
from airstream.reporting.units import round_up

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGINED_FOLDER = Path("imagined")

WRITING_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
"""Types as safetensors writes them: what needs the largest alignment first. Tensors of one type go by name."""

STORED_DTYPES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
METADATA = {"format": "pt"}
HEADER_ALIGNMENT = 8


class _Described(NamedTuple):
    """How a tensor is stored: safetensors' name of its type, its shape, its size."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def imagine(
    model: PreTrainedModel, dtype: torch.dtype | None = None, folder: Path = IMAGINED_FOLDER
) -> CheckpointIndex:
    """The index of the checkpoint that `model.save_pretrained(folder)` would write, as one file.

    Args:
        model: on the meta device.
        dtype: that its weights are stored in, if not their own. Those that the model keeps in another dtype than the
            rest stay as they are; where it computes in float32, those that it keeps in float32 are not known.
        folder: where the checkpoint would be; it need not exist.
    """
    own = model.dtype  # transformers looks for it among the weights, each time
    kinds = functools.cache(lambda declared, shape: _described(declared, shape, own, dtype))
    described = {key: kinds(tensor.dtype, tensor.shape) for key, tensor in stored_tensors(model).items()}
    ordered = sorted(described.items(), key=lambda item: (WRITING_ORDER.index(item[1].dtype), item[0]))
    offset = _data_start(ordered)
    file = folder / SINGLE_FILE
    tensors = {}
    for key, (name, shape, nbytes) in ordered:
        tensors[key] = StoredTensor(key, file, offset, nbytes, name, shape)
        offset += nbytes
    return CheckpointIndex(tensors)


def _described(
    declared: torch.dtype, shape: torch.Size, model_dtype: torch.dtype, dtype: torch.dtype | None
) -> _Described:
    stored = dtype if dtype is not None and declared == model_dtype else declared
    return _Described(STORED_DTYPES[stored], tuple(shape), shape.numel() * stored.itemsize)


def _data_start(ordered: Sequence[tuple[str, _Described]]) -> int:
    """Where the first tensor begins: behind the size of the header, and the header.

    Entries are measured one by one: a table of all of them, for json to write, would take as long as all the rest.
    """
    entry_bytes = functools.cache(lambda dtype, shape: len(_text({"dtype": dtype, "shape": shape, "data_offsets": []})))
    nbytes = len(_text({"__metadata__": METADATA}))
    end = 0
    for key, (name, shape, size) in ordered:
        nbytes += len(f",{_text(key)}:{end},{end + size}".encode()) + entry_bytes(name, shape)
        end += size
    return 8 + round_up(nbytes, HEADER_ALIGNMENT)


_text = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
