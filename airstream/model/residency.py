"""The hooks here have a layer's weights in place exactly while the layer runs.

transformers owns the forward pass; this owns what its modules contain. Before a unit runs, a lease of its batch is
taken from the streamer and its streamed tensors are bound; after it has run, or failed, they are unbound; after the
last unit of the batch, the lease is given back. Tensors that stay in memory are bound once, when they have been loaded.
Whether somebody has changed a weight is asked each time its layer runs.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.utils.hooks import RemovableHandle

from airstream.errors import UnsupportedError
from airstream.layout.tensors import TensorSpec
from airstream.model.binding import Binder, Binding, Views
from airstream.model.direct import Direct
from airstream.model.hook import Hook
from airstream.model.refusals import refuse_tracing
from airstream.reporting.probe import Probe
from airstream.streaming.fill import Fill, Resident
from airstream.streaming.lease import Lease
from airstream.streaming.streamer import Streamer

MAX_VIEWS_PER_BATCH = 16
"""Places in the ring for which a batch's views are made ahead."""


@dataclass(slots=True)
class _Batch:
    """A layer batch as the hooks see it.

    Attributes:
        streamed: the places of each unit's streamed tensors.
        resident: those of the tensors that stay, bound once `is_settled`.
        parts: the hooks of what may be called alone: modules inside of units.
    """

    fill: Fill
    streamed: list[Binding]
    resident: list[tuple[Resident, Binding]]
    parts: list[RemovableHandle] = field(default_factory=list)
    is_settled: bool = False

    def forget_parts(self) -> None:
        """Once nothing of the batch is streamed, its parts need no hooks."""
        if not self.fill.slab.nbytes:
            for handle in self.parts:
                handle.remove()
            self.parts.clear()


class Residency:
    """Keeps the units of a model supplied with weights.

    Args:
        batches: the names of the units in each batch.
        fills: what has to come for each batch, and how it lies in memory.
        direct: calls of units and their parts from outside.
        probe: told when units compute.
    """

    def __init__(
        self,
        binder: Binder,
        batches: Sequence[Sequence[str]],
        fills: Sequence[Fill],
        streamer: Streamer,
        direct: Direct,
        probe: Probe,
    ) -> None:
        self._streamer = streamer
        self._convert = binder.convert
        self._direct = direct
        self._probe = probe
        self._batches: list[_Batch] = []
        self._views: dict[tuple[int, int], list[Views]] = {}
        self._handles: list[RemovableHandle] = []
        self._lease: Lease | None = None
        self._running: str | None = None
        self._bound: list[Views] = []
        for number, (units, fill) in enumerate(zip(batches, fills, strict=False)):  # tables have no units
            resident = [(it, Binding(binder, _inside(units, it.slab.specs))) for it in fill.resident]
            streamed = [Binding(binder, _inside((unit,), fill.slab.specs)) for unit in units]
            self._batches.append(_Batch(fill, streamed, resident))
            for position, unit in enumerate(units):
                self._hook(binder.modules.get_submodule(unit), unit, number, position)
                self._hook_parts(binder.modules.get_submodule(unit), unit, number, position)

    def check(self) -> None:
        """Raise UnsupportedError if somebody has changed a weight, of any layer."""
        for batch in self._batches:
            for binding in (*batch.streamed, *(binding for _, binding in batch.resident)):
                binding.check()

    def let_go(self) -> None:
        """Unbind whatever is streamed and bound, and give back its batch. Idempotent."""
        self._running = None
        if self._lease is None:
            return
        lease, self._lease = self._lease, None
        for binding in self._batches[lease.region.batch].streamed:
            binding.unbind()
        lease.end()

    def close(self) -> None:
        """Remove the hooks, unbind everything and forget all views of the ring. Idempotent."""
        self.let_go()
        for handle in (*self._handles, *(handle for batch in self._batches for handle in batch.parts)):
            handle.remove()
        self._handles.clear()
        self._views.clear()
        self._bound = []
        for batch in self._batches:
            for _, binding in batch.resident:
                binding.unbind()
        self._batches.clear()

    def _hook(self, module: nn.Module, name: str, number: int, position: int) -> None:
        batch = self._batches[number]
        last = position == len(batch.streamed) - 1
        resident = [bound for _, bound in batch.resident]
        binding = batch.streamed[position]
        before, after = resident if position == 0 else [], [binding, *(resident if last else [])]
        handled: BaseException | None = None

        stats = self._streamer.stats

        def onload(called: nn.Module, args: tuple[object, ...]) -> None:
            nonlocal handled
            refuse_tracing()
            stats.layers += 1
            self._enter(called, args)
            handled = sys.exc_info()[1]
            for each in before:
                each.check()
            self._bring_in(name, number, position)
            if batch.parts and batch.is_settled:
                batch.forget_parts()
            if listener := self._probe.listener:
                listener.begin_unit(name)

        def offload(called: nn.Module, *_: object) -> None:
            has_run = self._running == name  # else it was refused, while another unit was in place
            try:
                if has_run:
                    self._running = None
                    if listener := self._probe.listener:
                        listener.end_unit()
                    _check(after, handled)
            finally:
                if has_run:
                    binding.unbind()
                if (has_run and last) or self._direct.module is called:
                    self.let_go()
                if self._direct.module is called:
                    self._direct.end()

        self._handles.append(module.register_forward_pre_hook(Hook(onload), prepend=True))
        self._handles.append(module.register_forward_hook(Hook(offload), always_call=True))

    def _hook_parts(self, module: nn.Module, name: str, number: int, position: int) -> None:
        """Let the parts of unit `name` bring it in when they are called by themselves."""
        batch = self._batches[number]
        bindings = [batch.streamed[position], *(bound for _, bound in batch.resident)]

        def onload(called: nn.Module, args: tuple[object, ...]) -> None:
            refuse_tracing()
            is_direct = self._enter(called, args)
            if self._running == name:
                return
            turn, handled = self._direct.turn, sys.exc_info()[1]

            def offload(*_: object) -> None:
                handle.remove()
                if self._direct.turn != turn:
                    return  # of a call that was interrupted
                try:
                    _check(bindings, handled)
                finally:
                    if self._running == name:
                        self.let_go()
                    if is_direct:
                        self._direct.end()

            handle = called.register_forward_hook(Hook(offload), always_call=True)
            for resident in bindings[1:]:
                resident.check()
            self._bring_in(name, number, position)

        for part in _parts(module, name, batch.fill):
            batch.parts.append(part.register_forward_pre_hook(Hook(onload), prepend=True))

    def _enter(self, module: nn.Module, args: tuple[object, ...]) -> bool:
        """`module` is called with `args`. Gives whether that is from outside of any call; then it has the turn now."""
        is_direct = not self._direct.is_inside
        if is_direct:
            self._direct.start(module, args)
        if is_direct or self._direct.was_interrupted():
            self.let_go()  # what an interrupt may have left
            self._streamer.recover()
        return is_direct

    def _bring_in(self, name: str, number: int, position: int) -> None:
        """Have the weights of unit `name` in place."""
        if self._running is not None:
            raise UnsupportedError(
                f"{name} was called while {self._running} computes, by one of its hooks: a streamed model has the "
                "weights of one of them in place. Note what the hook sees, and call the model when the pass is over"
            )
        batch = self._batches[number]
        self._streamer.check_open()
        if batch.fill.slab.nbytes or not batch.is_settled:
            self._hold(number)
            if batch.fill.slab.nbytes:
                batch.streamed[position].bind(self._bound[position])
        self._running = name

    def _hold(self, number: int) -> None:
        if self._lease is not None and self._lease.region.batch == number:
            return
        self.let_go()
        self._lease = self._streamer.lease(number)
        region, batch = self._lease.region, self._batches[number]
        if not batch.is_settled:
            self._settle(batch)
        slab = batch.fill.slab
        if region.fresh:
            self._convert.run(slab, region.memory)
            region.fresh = False
        key = (number, region.offset)
        if key not in self._views:
            if len(self._views) > MAX_VIEWS_PER_BATCH * len(self._batches):
                self._views.clear()  # places in the ring repeat; only a restless order of layers gets here
            self._views[key] = [binding.views(region.memory, slab.offsets) for binding in batch.streamed]
        self._bound = self._views[key]

    def _settle(self, batch: _Batch) -> None:
        """Bind what stays in memory, for good."""
        for resident, binding in batch.resident:
            resident.convert_once(self._convert.run)
            binding.bind(binding.views(resident.memory, resident.slab.offsets))
        batch.is_settled = True


def _check(bindings: Sequence[Binding], handled: BaseException | None) -> None:
    """Raise if somebody has changed a weight; where the module itself failed since `handled`, that is reported."""
    if sys.exc_info()[1] is handled:
        for binding in bindings:
            binding.check()


def _parts(unit: nn.Module, name: str, fill: Fill) -> list[nn.Module]:
    """The modules inside of `unit` that have tensors which are not there yet, or not always, in them."""
    slabs = (fill.slab, *(resident.slab for resident in fill.resident))
    tensors = [spec.name for slab in slabs for spec in slab.specs]
    paths = ((path, part) for path, part in unit.named_modules() if path)
    return [part for path, part in paths if any(tensor.startswith(f"{name}.{path}.") for tensor in tensors)]


def _inside(units: Collection[str], specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    prefixes = tuple(f"{unit}." for unit in units)
    return [spec for spec in specs if spec.name.startswith(prefixes)]
