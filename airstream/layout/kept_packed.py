"""This lets weights stay in memory as they are stored, where modules multiply with them so: `kernels="fast"`.

It knows modules and byte plans. It refuses to know how packed rows are multiplied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from airstream.codecs.block_types import BlockType
from airstream.codecs.products import format_of_blocks
from airstream.compat.packed_linear import PackedLinear
from airstream.layout.tensors import TensorSpec
from airstream.transfer.piece import Piece

__all__ = ["keep_packed"]


def keep_packed(model: PreTrainedModel, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """`specs` with the weights of `PackedLinear` modules as rows of bytes, where blocks of them can be multiplied.

    Those modules hold bytes from now on. A weight that is an embedding table, too, stays dense.
    """
    kept = dict(specs)
    uses = Counter(spec.pieces for spec in specs.values())
    for name, module in model.named_modules():
        spec = specs.get(f"{name}.weight")
        if not isinstance(module, PackedLinear) or module.row_format or spec is None or uses[spec.pieces] > 1:
            continue
        block = _block_of(spec)
        how = format_of_blocks(block, module.in_features) if block is not None else None
        if how is not None:
            module.hold(how, f"{spec.pieces[0].file}: tensor {spec.name!r}")
            del kept[spec.name]
            kept[f"{name}.packed"] = replace(
                spec,
                name=f"{name}.packed",
                dtype=torch.uint8,
                shape=(module.out_features, how.row_bytes),
                pieces=tuple(_as_stored(piece) for piece in spec.pieces),
                line_offset=0,
            )
    return kept


def _block_of(spec: TensorSpec) -> BlockType | None:
    """What all of `spec` is made of, if it is blocks of one type."""
    sources = {piece.cast.source if piece.cast is not None else None for piece in spec.pieces}
    only = next(iter(sources)) if len(sources) == 1 else None
    return only if isinstance(only, BlockType) and not spec.transposed else None


def _as_stored(piece: Piece) -> Piece:
    """The same bytes, unpacked nowhere; rows that are dealt out are dealt out packed."""
    cast = piece.cast
    assert cast is not None
    target = piece.target // cast.target_item_bytes * cast.source_item_bytes
    if cast.ways == 1:
        return replace(piece, target=target, cast=None)
    dealt = replace(cast, source="uint8", target="uint8", target_item_bytes=cast.source_item_bytes)
    return replace(piece, target=target, cast=dealt)
