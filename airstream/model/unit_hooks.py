"""The hooks on units, and on the modules inside of them, have the weights brought in and taken out.

transformers owns the forward pass; hooks see when it enters and leaves a module. They see calls from outside of any
pass, too, which take a turn. Whether somebody has changed a weight is asked each time its unit runs. They refuse to
know how weights come.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress

from torch import nn
from torch.utils.hooks import RemovableHandle

from airstream.errors import AirstreamError
from airstream.model.binding import Binding, Modules
from airstream.model.direct import Direct
from airstream.model.hook import Hook
from airstream.model.refusals import refuse_tracing
from airstream.model.residency import Batch, Residency, Unit
from airstream.reporting.probe import Probe
from airstream.reporting.stats import StreamStats


class UnitHooks:
    """Hooks every unit of `residency` among `modules`, which are not kept alive by this.

    Args:
        direct: calls of units and their parts from outside.
        probe: told when units compute.
        stats: count the units that are called.
    """

    def __init__(
        self, residency: Residency, modules: Modules, direct: Direct, probe: Probe, stats: StreamStats
    ) -> None:
        self.residency = residency
        self.direct = direct
        self.probe = probe
        self.stats = stats
        self._units: list[RemovableHandle] = []
        self._parts: defaultdict[Batch, list[RemovableHandle]] = defaultdict(list)
        for unit in residency.units:
            module, call = modules.get_submodule(unit.name), _UnitCall(self, unit)
            self._units.append(module.register_forward_pre_hook(Hook(call.begin), prepend=True, with_kwargs=True))
            self._units.append(module.register_forward_hook(Hook(call.end), always_call=True))
            for part in _parts(module, unit):
                begin = Hook(_PartCalls(self, unit).begin)
                self._parts[unit.batch].append(part.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))

    def enter(self, module: nn.Module, inputs: object) -> bool:
        """`module` is called with `inputs`. Gives whether from outside of any call: then it has the turn now."""
        is_direct = not self.direct.is_inside
        if is_direct:
            self.direct.refuse_gradients(module, inputs)
            self.direct.start(module)
        else:
            self.direct.refuse_graph()
        if is_direct:
            self.residency.recover()
        return is_direct

    def forget_parts(self, batch: Batch) -> None:
        """Once `batch` needs nothing any more, the modules inside of its units are called without a detour."""
        if batch in self._parts and batch.needs_nothing:
            _remove(self._parts.pop(batch))

    def close(self) -> None:
        """Remove the hooks. Idempotent."""
        _remove([*self._units, *(handle for handles in self._parts.values() for handle in handles)])
        self._units.clear()
        self._parts.clear()


class _UnitCall:
    """A call of `unit`, one after another."""

    def __init__(self, hooks: UnitHooks, unit: Unit) -> None:
        self._hooks = hooks
        self._unit = unit
        self._handled: BaseException | None = None

    def begin(self, called: nn.Module, *inputs: object) -> None:
        hooks, unit = self._hooks, self._unit
        refuse_tracing()
        hooks.stats.layers += 1
        hooks.enter(called, inputs)
        self._handled = sys.exc_info()[1]
        if unit.is_first:
            unit.batch.check_residents()
        hooks.residency.bring_in(unit)
        hooks.forget_parts(unit.batch)
        if listener := hooks.probe.listener:
            listener.begin_unit(unit.name)

    def end(self, called: nn.Module, *_: object) -> None:
        residency, direct, unit = self._hooks.residency, self._hooks.direct, self._unit
        has_run = residency.running is unit  # else it was refused, while another unit was in place
        try:
            if has_run:
                residency.running = None
                if listener := self._hooks.probe.listener:
                    listener.end_unit()
                _check([unit.streamed, *(_residents(unit.batch) if unit.is_last else ())], self._handled)
        finally:
            if has_run:
                unit.streamed.unbind()
            is_direct = direct.module is called
            if (has_run and unit.is_last) or is_direct:
                residency.let_go()
            if is_direct:
                _end(direct, residency, self._handled)


class _PartCalls:
    """Calls of one module inside of `unit`, which bring that in where it is not running."""

    def __init__(self, hooks: UnitHooks, unit: Unit) -> None:
        self._hooks = hooks
        self._unit = unit

    def begin(self, called: nn.Module, *inputs: object) -> None:
        refuse_tracing()
        is_direct = self._hooks.enter(called, inputs)
        if self._hooks.residency.running is self._unit:
            return
        _PartCall(self._hooks, self._unit, called, is_direct)  # before anything that fails, for it sees the end
        self._unit.batch.check_residents()
        self._hooks.residency.bring_in(self._unit)


class _PartCall:
    """One call of the module `called` inside of `unit`, which is not running: its end is seen by a hook of its own."""

    def __init__(self, hooks: UnitHooks, unit: Unit, called: nn.Module, is_direct: bool) -> None:
        self._hooks = hooks
        self._unit = unit
        self._is_direct = is_direct
        self._turn = hooks.direct.turn
        self._handled = sys.exc_info()[1]
        self._handle = called.register_forward_hook(Hook(self._end), always_call=True)

    def _end(self, *_: object) -> None:
        residency, direct = self._hooks.residency, self._hooks.direct
        self._handle.remove()
        if direct.turn != self._turn:
            return  # of a call that was interrupted
        try:
            _check([self._unit.streamed, *_residents(self._unit.batch)], self._handled)
        finally:
            if residency.running is self._unit:
                residency.let_go()
            if self._is_direct:
                _end(direct, residency, self._handled)


def _end(direct: Direct, residency: Residency, handled: BaseException | None) -> None:
    """Make an end of a call from outside. Raise if somebody has changed weights that others had before."""
    try:
        if sys.exc_info()[1] is handled:
            residency.check_lent()
    finally:
        direct.end()


def _check(bindings: Iterable[Binding], handled: BaseException | None) -> None:
    """Raise if somebody has changed a weight; where the module itself failed since `handled`, that is reported.

    Then the change is reported by the next call: here are the values that it has to be judged by.
    """
    own_failures = () if sys.exc_info()[1] is handled else (AirstreamError,)
    for binding in bindings:
        with suppress(*own_failures):
            binding.check()


def _residents(batch: Batch) -> list[Binding]:
    return [binding for _, binding in batch.resident]


def _parts(module: nn.Module, unit: Unit) -> list[nn.Module]:
    """The modules inside of `unit`, the `module`, that have tensors which are not there yet, or not always, in them."""
    fill = unit.batch.fill
    tensors = [spec.name for slab in (fill.slab, *(it.slab for it in fill.resident)) for spec in slab.specs]
    paths = ((path, part) for path, part in module.named_modules() if path)
    return [part for path, part in paths if any(tensor.startswith(f"{unit.name}.{path}.") for tensor in tensors)]


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
