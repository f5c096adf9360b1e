"""What stays in place while a model runs: resident weights, and tables of which rows are read from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from airstream.backend import Backend
from airstream.backend.landing import HostLanding, Staging
from airstream.checkpoint.reader import Piece, Reader
from airstream.layout import TensorSpec
from airstream.model.binding import Binding
from airstream.model.residency import Convert, convert_slab
from airstream.model.rows import FetchRows, RowTable
from airstream.slab import distinct, pack


def bind_residents(
    model: nn.Module,
    residents: Sequence[TensorSpec],
    rows: Mapping[str, TensorSpec],
    reader: Reader,
    backend: Backend,
    convert: Convert,
) -> list[Binding]:
    """Read `residents` into one slab and bind them; put row tables where `rows` are looked up. Blocks for the reads.

    A table whose bytes are resident anyway, because the lm_head is tied to it, is bound to them instead. Weights that
    are tied share their memory.
    """
    slab = pack(distinct(residents), backend.packing)
    memory = backend.allocate(slab.nbytes)
    fence = backend.new_fence()
    backend.begin_fill()
    reader.read(slab.pieces, backend.landing(memory))
    backend.end_fill(fence)
    backend.wait_filled(fence)
    convert_slab(slab, memory, convert)
    at = {_identity(spec): slab.offsets[spec.name] for spec in slab.specs}
    bindings = []
    for spec in (*residents, *rows.values()):
        binding = Binding(model, [spec])
        if _identity(spec) in at:
            binding.bind(binding.views(memory, {spec.name: at[_identity(spec)]}))
        else:
            fetch = _row_fetcher(spec, reader, backend.device)
            binding.bind([RowTable(fetch, spec.shape, spec.dtype, backend.device)])
        bindings.append(binding)
    return bindings


def _identity(spec: TensorSpec) -> object:
    """Equal for tensors that are made of the same bytes."""
    return spec.pieces or spec.name


def _row_fetcher(spec: TensorSpec, reader: Reader, device: torch.device) -> FetchRows:
    """Reads rows of `spec`, whose bytes are one piece of a file, to `device`."""
    (table,) = spec.pieces
    stored_row, row = table.nbytes // spec.shape[0], spec.nbytes // spec.shape[0]
    staging = Staging(stored_row)

    def fetch(numbers: Sequence[int]) -> torch.Tensor:
        memory = torch.empty(len(numbers) * row, dtype=torch.uint8)
        pieces = [
            Piece(table.file, table.offset + number * stored_row, stored_row, position * row, table.cast)
            for position, number in enumerate(numbers)
        ]
        reader.read(pieces, HostLanding(memory, staging))
        return memory.view(spec.dtype).view(len(numbers), *spec.shape[1:]).to(device)

    return fetch
