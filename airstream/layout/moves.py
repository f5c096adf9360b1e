"""A converter that only moves rows was run on row numbers: this reads from the result where each row came from.

It knows numbers, rows and byte plans. It refuses to know how converters are run.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from airstream.checkpoint.stored import StoredTensor
from airstream.layout.pieces import dealt_piece, item_of, piece_of
from airstream.layout.row_numbers import dealt, is_permutation, runs
from airstream.layout.tensors import TensorSpec

__all__ = ["Moves", "find_moves", "spec_of_moves"]


@dataclass(frozen=True, slots=True)
class Moves:
    """Where the rows of one result come from.

    Attributes:
        shape: the shape of the result.
        runs: (first row in the result, number of the source, first row in it, how many rows).
        deal: (rows, ways) if the rows of the only source are dealt out: then there is one run for each of them.
    """

    shape: tuple[int, ...]
    runs: tuple[tuple[int, int, int, int], ...]
    deal: tuple[int, int] | None = None


def find_moves(
    outputs: Mapping[str, torch.Tensor],
    stored: Sequence[StoredTensor],
    width: int,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Moves] | None:
    """What a converter did to numbered rows of `width` of `stored`; None if it did more than move them.

    Args:
        outputs: the numbers that it gave, by name; one for a row, if rows have a width.
        shapes, dtypes: what the model has of each name.
    """
    counts = [math.prod(tensor.shape) // width for tensor in stored]
    starts = [0, *itertools.accumulate(counts[:-1])]
    everything = torch.cat([ids.reshape(-1) for ids in outputs.values()])
    if not is_permutation(everything, sum(counts)):
        return None
    begins = torch.zeros(sum(counts) + 1, dtype=torch.bool, device="cpu")  # one more: an empty source may be the last
    begins[starts] = True
    found = {}
    for name, ids in outputs.items():
        shape = (*ids.shape[:-1], width) if width > 1 else tuple(ids.shape)
        if shapes.get(name) != shape or (width > 1 and ids.shape[-1] != 1):
            return None
        deal = dealt(ids.reshape(-1)) if len(stored) == len(outputs) == 1 else None
        if deal is not None and dealt_piece(stored[0], width, *deal, dtypes[name]):
            found[name] = Moves(shape, (), deal)
            continue
        located = []
        for begin, first, count in runs(ids.reshape(-1), begins):
            number = bisect.bisect_right(starts, first) - 1
            located.append((begin, number, first - starts[number], count))
        found[name] = Moves(shape, tuple(located))
    return found


def spec_of_moves(
    name: str, moves: Moves, stored: Sequence[StoredTensor], width: int, dtype: torch.dtype
) -> TensorSpec:
    """The byte plan of `name`, whose rows of `width` come from `stored` as `moves` says. It starts a cache line."""
    if moves.deal is not None and (piece := dealt_piece(stored[0], width, *moves.deal, dtype)) is not None:
        return TensorSpec(name, dtype, moves.shape, (piece,), line_offset=0)
    row_bytes = [width // elements * nbytes for elements, nbytes in (item_of(tensor) for tensor in stored)]
    pieces = tuple(
        piece_of(stored[number], first * row_bytes[number], count * row_bytes[number], begin * row_bytes[number], dtype)
        for begin, number, first, count in moves.runs
    )
    return TensorSpec(name, dtype, moves.shape, pieces, line_offset=0)
