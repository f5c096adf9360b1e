"""This binds what stays in place while a model runs: small weights outside the layers, and embedding tables.

Of a table that is not in memory, only the rows that are looked up are read from disk.

It knows what is read once. It refuses to know which tables stay: that is in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from airstream.layout.slab import Slab, distinct, pack
from airstream.layout.tensors import TensorSpec, view_of
from airstream.model.binding import Binder, Binding
from airstream.model.conversion import Converter
from airstream.model.row_table import FetchTable, RowTable
from airstream.model.stored_in_files import row_fetcher
from airstream.streaming.fill import Resident
from airstream.transfer.machinery import Machinery


def bind_residents(binder: Binder, residents: Sequence[TensorSpec], machinery: Machinery) -> list[Binding]:
    """Read `residents` into one slab and bind them. Blocks for the reads. Weights that are tied share their memory."""
    backend = machinery.backend
    slab = pack(distinct(residents), backend.packing)
    memory = backend.allocate(slab.nbytes)
    fence = backend.new_fence()
    backend.begin_fill()
    machinery.reader.read(slab.pieces, backend.landing(memory))
    backend.end_fill(fence)
    backend.wait_filled(fence)
    binder.convert.run(slab, memory)
    at = {spec.identity: slab.offsets[spec.name] for spec in slab.specs if spec.name in slab.offsets}
    bindings = []
    for spec in residents:
        binding = Binding(binder, [spec])
        binding.bind(binding.views(memory, _offsets(spec, slab, at)))
        bindings.append(binding)
    return bindings


def bind_tables(
    binder: Binder,
    tables: Sequence[TensorSpec],
    resident: Callable[[TensorSpec], Resident | None],
    machinery: Machinery,
) -> list[Binding]:
    """Put a table where rows are looked up. Nothing is read yet.

    Args:
        resident: where the bytes of a table stay, if they do. Until they have been loaded, rows are read from disk.
    """
    bindings, device = [], machinery.backend.device
    for spec in tables:
        binding = Binding(binder, [spec])
        rows = row_fetcher(spec, machinery.reader, device, machinery.probe)
        whole = _whole_table(spec, resident(spec), binding, binder.convert, machinery)
        table = RowTable(binder.stored[spec.name], spec.shape, spec.dtype, device, rows, whole)
        binding.bind(binding.guarded([table]))
        bindings.append(binding)
    return bindings


def _offsets(spec: TensorSpec, slab: Slab, at: Mapping[object, int]) -> Mapping[str, int]:
    """Where `spec`, whose bytes may be in `slab` under another name, starts."""
    return slab.offsets if spec.identity not in at else {**slab.offsets, spec.name: at[spec.identity]}


def _whole_table(
    spec: TensorSpec, resident: Resident | None, binding: Binding, convert: Converter, machinery: Machinery
) -> FetchTable:
    """Gives the table once it is in memory, and puts it in the place of the one that is not."""

    def fetch() -> torch.Tensor | None:
        if resident is None or not resident.loaded:
            return None
        fence = machinery.backend.new_fence()
        machinery.backend.end_fill(fence)
        machinery.backend.wait_filled(fence)  # the copies that brought it may still be queued
        resident.convert_once(convert.run)
        if listener := machinery.probe.listener:  # this once: from here on no row comes from disk
            listener.begin_wait()
            listener.waited_for_rows(resident.slab.read_bytes)
        (name,) = (other.name for other in resident.slab.specs if other.identity == spec.identity)
        offset = resident.slab.offsets[name]
        binding.bind(binding.views(resident.memory, {spec.name: offset}))
        return view_of(resident.memory, offset, spec)

    return fetch
