"""This reads a stored weight from the files of the checkpoint when somebody asks for its values, or for some rows.

It knows one tensor and how to read it. It refuses to know modules, and whether the weight is in memory anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from airstream.errors import BudgetError
from airstream.layout.slab import pack
from airstream.layout.tensors import TensorSpec, view_of
from airstream.model.conversion import Converter
from airstream.model.stored import FetchRows, Stored
from airstream.model.weight_refusals import refuse_copy_of_packed
from airstream.reporting.probe import Probe
from airstream.reporting.units import MIB, format_bytes
from airstream.system.memory import available_host_bytes
from airstream.transfer.landing import HostLanding, Staging
from airstream.transfer.packing import HOST_PACKING
from airstream.transfer.piece import Piece
from airstream.transfer.reader import Reader

COMPARED_BYTES = 8 * MIB
"""The bytes of rows that are read at once to be compared."""


class StoredInFiles(Stored):
    """The checkpoint's values of `spec`. Names that are tied share one.

    Args:
        device: the device that computes, where values are brought.
    """

    def __init__(self, spec: TensorSpec, reader: Reader, convert: Converter, device: torch.device) -> None:
        self.name = spec.name
        self._spec = spec
        self._reader = reader
        self._convert = convert
        self._device = device
        self.is_packed = spec.made_by is not None and spec.made_by.is_object

    def read(self) -> torch.Tensor:
        spec = self._spec
        if self.is_packed:
            refuse_copy_of_packed(spec.name)
        slab = pack((spec,), HOST_PACKING)
        free = available_host_bytes()
        if slab.nbytes > free:
            raise BudgetError(
                f"a copy of {spec.name!r} takes {format_bytes(slab.nbytes)}, and {format_bytes(free)} of memory are "
                "free: copy fewer weights at once, or read the checkpoint's files with safetensors.safe_open"
            )
        memory = torch.empty(slab.nbytes, dtype=torch.uint8, device="cpu")
        self._reader.read(slab.pieces, HostLanding(memory, Staging(self._reader.chunk_bytes)))
        self._convert.run(slab, memory)
        values = view_of(memory, slab.offsets[spec.name], spec)
        return (values if spec.made_by is None else values.clone()).to(self._device)  # without what it was made of

    def rows(self, numbers: Sequence[int]) -> torch.Tensor:
        if self._has_rows:
            return row_fetcher(self._spec, self._reader, self._device, Probe())(numbers)
        return self.read()[torch.tensor(numbers, dtype=torch.int64, device=self._device)]

    def has(self, values: torch.Tensor) -> bool:
        spec = self._spec
        if values.shape != spec.shape or values.device.type == "meta":
            return False
        values = values.detach().to(spec.dtype)
        if not self._has_rows:
            return torch.equal(self.read(), values.to(self._device))
        fetch = row_fetcher(spec, self._reader, torch.device("cpu"), Probe())
        step = max(COMPARED_BYTES // max(values[:1].nbytes, 1), 1)
        blocks = (range(start, min(start + step, len(values))) for start in range(0, len(values), step))
        return all(torch.equal(fetch(block), values[block.start : block.stop].cpu()) for block in blocks)

    @property
    def _has_rows(self) -> bool:
        """Whether each row is a run of bytes of one file."""
        spec = self._spec
        if len(spec.pieces) != 1 or not spec.shape or spec.transposed:
            return False
        cast = spec.pieces[0].cast
        return cast is None or (cast.ways == 1 and spec.nbytes // spec.shape[0] % cast.target_item_bytes == 0)


def all_stored(
    specs: Iterable[TensorSpec], reader: Reader, convert: Converter, device: torch.device
) -> dict[str, Stored]:
    """The checkpoint's weights by every name they have."""
    by_bytes: dict[object, Stored] = {}
    return {
        spec.name: by_bytes.setdefault(spec.identity, StoredInFiles(spec, reader, convert, device)) for spec in specs
    }


def row_fetcher(spec: TensorSpec, reader: Reader, device: torch.device, probe: Probe) -> FetchRows:
    """Reads rows of `spec`, whose bytes are one piece of a file, to `device`."""
    (table,) = spec.pieces
    stored_row, row = table.nbytes // spec.shape[0], spec.nbytes // spec.shape[0]
    staging = Staging(stored_row)

    def fetch(numbers: Sequence[int]) -> torch.Tensor:
        if listener := probe.listener:
            listener.begin_wait()
        memory = torch.empty(len(numbers) * row, dtype=torch.uint8, device="cpu")
        pieces = [
            Piece(table.file, table.offset + number * stored_row, stored_row, position * row, table.cast)
            for position, number in enumerate(numbers)
        ]
        reader.read(pieces, HostLanding(memory, staging))
        if listener:
            listener.waited_for_rows(len(numbers) * stored_row)
        return memory.view(spec.dtype).view(len(numbers), *spec.shape[1:]).to(device)

    return fetch
