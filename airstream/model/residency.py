"""Hooks that have a layer's weights in place exactly while the layer runs.

transformers owns the forward pass; this owns what its modules contain. Before a unit runs, the batch it belongs to is
acquired from the streamer and its tensors are bound; after it has run, or failed, they are unbound; after the last unit
of the batch, the batch is released.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from airstream.layout import RAW_PREFIX
from airstream.model.binding import Binding, view_of
from airstream.slab import Slab
from airstream.streamer import Streamer

Convert = Callable[[str, Sequence[tuple[str, str, torch.Tensor]]], Mapping[str, torch.Tensor]]
"""A converter of transformers: name, (key, pattern, raw tensor) of each source -> converted tensors."""


MAX_VIEWS_PER_BATCH = 16
"""Places in the ring for which a batch's views are kept ready."""


class Residency:
    """Keeps `model`'s units supplied with weights.

    Args:
        batches: the names of the units in each batch.
        slabs: how each batch's tensors lie in memory.
        convert: runs the conversions that some slabs ask for.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[str]],
        slabs: Sequence[Slab],
        streamer: Streamer,
        convert: Convert,
    ) -> None:
        self._slabs = slabs
        self._streamer = streamer
        self._convert = convert
        self._bindings: list[list[Binding]] = []
        self._views: dict[tuple[int, int], list[list[torch.Tensor]]] = {}
        self._handles: list[RemovableHandle] = []
        self._held: int | None = None
        self._bound: list[list[torch.Tensor]] = []
        for batch, units in enumerate(batches):
            self._bindings.append([_binding(model, unit, slabs[batch]) for unit in units])
            for position, unit in enumerate(units):
                self._hook(model.get_submodule(unit), batch, position, last=position == len(units) - 1)

    def let_go(self) -> None:
        """Unbind whatever is bound and release the batch that is held. Idempotent."""
        if self._held is None:
            return
        batch, self._held = self._held, None
        for binding in self._bindings[batch]:
            binding.unbind()
        self._streamer.release(batch)

    def close(self) -> None:
        """Remove the hooks and forget all views of the ring. Idempotent."""
        self.let_go()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._views.clear()
        self._bound = []

    def _hook(self, module: nn.Module, batch: int, position: int, last: bool) -> None:
        binding = self._bindings[batch][position]

        def onload(*_: object) -> None:
            self._hold(batch)
            binding.bind(self._bound[position])

        def offload(*_: object) -> None:
            binding.unbind()
            if last:
                self.let_go()

        self._handles.append(module.register_forward_pre_hook(onload, prepend=True))
        self._handles.append(module.register_forward_hook(offload, always_call=True))

    def _hold(self, batch: int) -> None:
        if self._held == batch:
            return
        self.let_go()
        region = self._streamer.acquire(batch)
        self._held = batch
        if region.fresh:
            convert_slab(self._slabs[batch], region.memory, self._convert)
            region.fresh = False
        key = (batch, region.offset)
        if key not in self._views:
            if len(self._views) > MAX_VIEWS_PER_BATCH * len(self._slabs):
                self._views.clear()  # places in the ring repeat; only a restless order of layers gets here
            self._views[key] = [b.views(region.memory, self._slabs[batch].offsets) for b in self._bindings[batch]]
        self._bound = self._views[key]


def convert_slab(slab: Slab, memory: torch.Tensor, convert: Convert) -> None:
    """Run the conversions of a freshly filled slab: raw tensors in `memory` in, the model's tensors in `memory` out."""
    specs = {spec.name: spec for spec in slab.specs}
    for conversion in slab.conversions:
        sources = [
            (raw.name.removeprefix(RAW_PREFIX), pattern, view_of(memory, slab.offsets[raw.name], raw))
            for raw, pattern in zip(conversion.sources, conversion.patterns, strict=True)
        ]
        for name, value in convert(conversion.name, sources).items():
            view_of(memory, slab.offsets[name], specs[name]).copy_(value)


def _binding(model: nn.Module, unit: str, slab: Slab) -> Binding:
    prefix = f"{unit}."
    return Binding(model, [spec for spec in slab.specs if spec.name.startswith(prefix)])
