"""A simulated accelerator: the device `sim:0`, in pure Python, for tests of code that drives a real one.

    with SimDevice(memory_limit=1 << 20) as sim:
        runtime = SimRuntime(sim)
        model.to("sim").generate(ids.to("sim"))

It knows whose memory is whose (`SimTensor`; mixing devices is an error) and how much there is of it, that asynchronous
copies are late (`SimRuntime.copy` moves nothing until somebody waits), and which accesses are ordered behind which
(vector clocks; two that are not ordered, one of them a write, are a race). It refuses to know autograd and
airstream.

It can be slow, too: given `kernel_seconds` and `copy_bytes_per_second`, every operation and every copy takes that long
on its stream, by the clock of the host. Whoever waits sleeps until it is over; `SimStream.busy` has the truth for
profilers.

Computations run at once, in the calling thread, yet count as unfinished work of the compute stream until an event
recorded behind them has been waited for: that is how a slot overwritten too early is caught although its reader is long
done. Memory belongs to the compute stream, as with torch's caching allocator: allocating and freeing it count as writes
on that stream. Transfers made by torch itself (`.to()`, `.cpu()`, `.item()`) also run at once and, unless
`non_blocking`, block the host until the compute stream is done, as on CUDA.

There is one device, one compute stream and one logical host: what any thread has waited for counts as known to all,
because the locks between threads cannot be seen from here. A strided view counts as all bytes from its first to its
last.
"""

# torch.library and torch.library.Library.impl have no annotations
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ctypes
import functools
import threading
import time
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

if TYPE_CHECKING:
    from airstream.transfer.host_memory import HostBuffer
    from airstream.transfer.runtime import Stream

__all__ = ["RaceError", "SimDevice", "SimEvent", "SimRuntime", "SimStream", "SimTensor"]

aten = torch.ops.aten

_POISON = 0xFF
"""Fills uninitialised and freed memory: NaN as float64, float32, float16, bfloat16, float8_e4m3fn and float8_e5m2."""
_UNINITIALISED = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}
_TRANSFERS = {aten.copy_.default, aten._to_copy.default}
_TAKE_HOST_INDICES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_ATTENTION = aten.scaled_dot_product_attention.default
_FACTORIES = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.arange.default,  # torch would make these three by resizing an empty tensor; the shape of a wrapper is fixed
    aten.arange.start,
    aten.arange.start_step,
)


class RaceError(RuntimeError):
    """Two accesses to the same device bytes, one of them a write, that nothing orders."""


Clock = Mapping[int, int]
"""By index of a stream, its last epoch that is known to be done. Never changed, only replaced."""


def _join(clock: Clock, other: Clock) -> Clock:
    """What both know together."""
    return {stream: max(clock.get(stream, 0), other.get(stream, 0)) for stream in clock.keys() | other.keys()}


class Access(NamedTuple):
    """Something that a stream did to device memory, and what that stream knew."""

    stream: SimStream
    clock: Clock
    what: object

    def is_before(self, other: Access) -> bool:
        """Whether this one is certain to be done when the other one begins."""
        index = self.stream.index
        return other.clock.get(index, 0) >= self.clock[index]

    def __str__(self) -> str:
        return f"{self.what} on the {self.stream.name} stream"


@dataclass
class _Span:
    """Bytes [start, stop) with one history: the last write, and by stream the last read since."""

    start: int
    stop: int
    write: Access
    reads: dict[int, Access] = field(default_factory=dict)


class History:
    """Who wrote and read which bytes of one allocation last.

    Spans tile the allocation. A write melts those it covers into one, so there are never more of them than there are
    ends of ranges in use.
    """

    def __init__(self, nbytes: int, write: Access) -> None:
        self.nbytes = nbytes
        self._spans = [_Span(0, nbytes, write)]

    def read(self, start: int, stop: int, access: Access) -> Access | None:
        """Note a read; returns a write that is not certain to come before it, if there is one."""
        spans = self._spans[self._cut(start, stop)]
        for span in spans:
            span.reads[access.stream.index] = access
        return next((span.write for span in spans if not span.write.is_before(access)), None)

    def write(self, start: int, stop: int, access: Access) -> Access | None:
        """Note a write; returns an access that is not certain to come before it, if there is one."""
        where = self._cut(start, stop)
        earlier = [each for span in self._spans[where] for each in (span.write, *span.reads.values())]
        self._spans[where] = [_Span(start, stop, access)]
        return next((each for each in earlier if not each.is_before(access)), None)

    def _cut(self, start: int, stop: int) -> slice:
        """The spans that make up [start, stop), after cutting those that stick out."""
        return slice(self._boundary(start), self._boundary(stop))

    def _boundary(self, at: int) -> int:
        """The index of the span that starts at `at`, after cutting the one that reaches across."""
        index = bisect_left(self._spans, at, key=lambda span: span.start)
        if index and self._spans[index - 1].stop > at:
            head = self._spans[index - 1]
            self._spans.insert(index, _Span(at, head.stop, head.write, dict(head.reads)))
            head.stop = at
        return index


class HostClock:
    """The host's time, which streams work in."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, second: float) -> None:
        time.sleep(max(0.0, second - self.now()))


class StillClock(HostClock):
    """Stands still but for waits: time is what the device takes, however slow the host is, and passes at once."""

    def __init__(self) -> None:
        self._now = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        return self._now

    def sleep_until(self, second: float) -> None:
        with self._lock:
            self._now = max(self._now, second)


class _Point(NamedTuple):
    """A place in a stream's queue, what is known to be done once the stream has reached it, and when it does."""

    stream: SimStream
    position: int
    clock: Clock
    at: float

    def reach(self) -> None:
        self.stream.advance(self.position)

    def sleep(self) -> None:
        """Block until the stream has reached it. Called without the device's lock."""
        self.stream.host.sleep_until(self.at)


class SimStream:
    """An ordered queue of device work, done only as far as somebody waits for it; at once if it is eager.

    It knows the order of its work, not what the work is. Its own entry in its clock counts epochs, which end where an
    event is recorded. All but `record_event` and `wait_event` are called with the device's lock held.

    Attributes:
        host: the clock that it works by.
        busy: when it was at work, in seconds of that clock.
        free_at: when all work that is queued will be done.
    """

    def __init__(self, sim: SimDevice, index: int, name: str, is_eager: bool) -> None:
        self.index = index
        self.name = name
        self.clock: Clock = {index: 1}
        self.host = sim.host
        self._sim = sim
        self._is_eager = is_eager
        self.busy: list[tuple[float, float]] = []
        self.free_at = 0.0
        self._queue: deque[Callable[[], None]] = deque()
        self._num_submitted = 0
        self._num_done = 0

    def record_event(self, event: SimEvent) -> SimEvent:
        """Move `event` to the end of this stream's queue."""
        with self._sim.lock:
            event.point = self.mark()
        return event

    def wait_event(self, event: SimEvent) -> None:
        """Order what is submitted from now on behind `event`, as it was recorded last."""
        with self._sim.lock:
            if event.point is not None:
                self.clock = _join(self.clock, event.point.clock)
                self.free_at = max(self.free_at, event.point.at)
                self.submit(event.point.reach)

    def spend(self, seconds: float) -> None:
        """Be busy for so long, once all that is queued is done."""
        if seconds:
            start = max(self.free_at, self.host.now())
            self.free_at = start + seconds
            self.busy.append((start, self.free_at))

    def submit(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        self._num_submitted += 1
        if self._is_eager:
            self.advance(self._num_submitted)

    def advance(self, position: int) -> None:
        """Do the work up to `position`."""
        while self._num_done < position:
            self._num_done += 1
            self._queue.popleft()()

    def mark(self) -> _Point:
        """The end of the queue. Ends the epoch, so that the point does not cover what comes behind it."""
        self._follow_host()
        point = _Point(self, self._num_submitted, self.clock, max(self.free_at, self.host.now()))
        self.clock = {**self.clock, self.index: self.clock[self.index] + 1}
        return point

    def access(self, what: object) -> Access:
        """An access submitted now."""
        self._follow_host()
        return Access(self, self.clock, what)

    def _follow_host(self) -> None:
        """What is submitted now is ordered behind all that the host has waited for."""
        self.clock = _join(self.clock, self._sim.host_clock)


class SimEvent:
    """A point in a stream, once one has recorded it."""

    def __init__(self, sim: SimDevice) -> None:
        self.point: _Point | None = None
        self._sim = sim

    def synchronize(self) -> None:
        """Have the stream's work done up to this point."""
        if self.point is not None:
            self.point.sleep()
        with self._sim.lock:
            if self.point is not None:
                self._sim.wait_on_host(self.point)

    def query(self) -> bool:
        """Whether the stream has reached this point."""
        return self.point is None or self.point.at <= self.point.stream.host.now()


class Memory:
    """One allocation on the device; lives as long as a tensor that aliases it."""

    def __init__(self, sim: SimDevice, storage: torch.UntypedStorage, write: Access) -> None:
        self.sim = sim
        self.history = History(storage.nbytes(), write)
        weakref.finalize(self, sim.free, storage, self.history).atexit = False


class SimDevice:
    """The memory and the streams of `sim:0`, and the races found there, while in use as a context manager.

    The first one registers `sim` with torch, which cannot be undone. Leaving the context raises what `check` would,
    unless an exception is on its way already.

    Args:
        memory_limit: device bytes that may be allocated at once; more raises `torch.OutOfMemoryError`.
        raise_races: raise `RaceError` where a race is found, if on the main thread. The others wait for `check`.
        kernel_seconds: that every operation takes which is not a view.
        copy_bytes_per_second: of copies from the host; None: they take no time.
        pin_bytes_per_second: of pinning host memory, in the thread that asks for it; None: it takes no time.
        host: the clock that it works by.

    Attributes:
        pins: by which thread and when memory was pinned that may be unpinned by now: name, start, end, bytes.
        pinned_bytes: that are pinned.
    """

    def __init__(
        self,
        memory_limit: int | None = None,
        raise_races: bool = True,
        kernel_seconds: float = 0.0,
        copy_bytes_per_second: float | None = None,
        pin_bytes_per_second: float | None = None,
        host: HostClock | None = None,
    ) -> None:
        _register()
        self.host = host or HostClock()
        self.kernel_seconds = kernel_seconds
        self.copy_bytes_per_second = copy_bytes_per_second
        self.pin_bytes_per_second = pin_bytes_per_second
        self.pins: list[tuple[str, float, float, int]] = []
        self.pinned_bytes = 0
        self.device = torch.device("sim", 0)
        self.memory_limit = memory_limit
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self.h2d_bytes = 0
        self.races: list[str] = []
        self.lock = threading.RLock()  # reentrant, because the collector may free a tensor anywhere
        self.host_clock: Clock = {}
        self._streams: list[SimStream] = []
        self.compute_stream = self.new_stream("compute", is_eager=True)
        self._raise_races = raise_races
        self._unraised: list[str] = []

    def __enter__(self) -> SimDevice:
        module = torch.get_device_module("sim")
        if module.active is not None:
            raise RuntimeError("another SimDevice is in use: there is one sim:0 at a time")
        module.active = self
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        torch.get_device_module("sim").active = None
        if exc_type is None:
            self.check()

    def check(self) -> None:
        """Raise `RaceError` if races were found that have not been raised yet."""
        with self.lock:
            unraised, self._unraised = self._unraised, []
        if unraised:
            raise RaceError("\n".join(unraised))

    def new_stream(self, name: str, is_eager: bool = False) -> SimStream:
        """A stream that begins now; `name` is for messages."""
        with self.lock:
            stream = SimStream(self, len(self._streams), name, is_eager)
            self._streams.append(stream)
        return stream

    def synchronize(self) -> None:
        """Have all work done that was submitted."""
        with self.lock:
            points = [stream.mark() for stream in self._streams]
        for point in points:
            point.sleep()
        with self.lock:
            for point in points:
                self.wait_on_host(point)

    def wait_on_host(self, point: _Point) -> None:
        """Reach `point`, and let the host know. The caller holds the lock."""
        point.reach()
        self.host_clock = _join(self.host_clock, point.clock)

    def copy(self, destination: SimTensor, source: torch.Tensor, stream: SimStream) -> None:
        """Queue a copy of what `source` will hold when it runs, if its memory is still there."""
        storage = weakref.ref(source.untyped_storage())
        with self.lock:
            self.touch(destination, stream, "a copy", is_write=True)
            if self.copy_bytes_per_second is not None:
                stream.spend(destination.nbytes / self.copy_bytes_per_second)
            stream.submit(functools.partial(self._move, destination.raw, storage, _byte_range(source)[0]))

    def compute(
        self,
        destination: SimTensor,
        source: SimTensor,
        work: Callable[[torch.Tensor, torch.Tensor], None],
        stream: SimStream,
    ) -> None:
        """Queue `work` on the bytes that both will hold when it runs."""
        with self.lock:
            self.touch(source, stream, "a computation", is_write=False)
            self.touch(destination, stream, "a computation", is_write=True)
            stream.spend(self.kernel_seconds)
            stream.submit(functools.partial(work, destination.raw, source.raw))

    def _move(self, destination: torch.Tensor, source: weakref.ref[torch.UntypedStorage], start: int) -> None:
        storage = source()
        if storage is None:
            ctypes.memset(destination.data_ptr(), _POISON, destination.nbytes)
            self._keep("race: a copy runs after its source on the host was freed")
            self._raise_here()
        else:
            ctypes.memmove(destination.data_ptr(), storage.data_ptr() + start, destination.nbytes)
            self.h2d_bytes += destination.nbytes

    def adopt(self, raw: torch.Tensor, func: OpOverload[..., Any]) -> SimTensor:
        """The device tensor over what `func` has made on the CPU: new memory, written by the compute stream."""
        storage = raw.untyped_storage()
        with self.lock:
            self._charge(storage.nbytes())
            if func.overloadpacket in _UNINITIALISED:
                ctypes.memset(storage.data_ptr(), _POISON, storage.nbytes())
            return SimTensor(raw, Memory(self, storage, self.compute_stream.access(f"the allocation by {func}")))

    def pin(self, nbytes: int) -> None:
        """Pin so much host memory. Blocks the calling thread, and nobody else, for as long as it takes."""
        start = time.perf_counter()
        if self.pin_bytes_per_second is not None:
            time.sleep(nbytes / self.pin_bytes_per_second)
        with self.lock:
            self.pins.append((threading.current_thread().name, start, time.perf_counter(), nbytes))
            self.pinned_bytes += nbytes

    def unpin(self, nbytes: int) -> None:
        with self.lock:
            self.pinned_bytes -= nbytes

    def _charge(self, nbytes: int) -> None:
        if self.memory_limit is not None and self.allocated_bytes + nbytes > self.memory_limit:
            raise torch.OutOfMemoryError(
                f"sim:0 has {self.allocated_bytes} of {self.memory_limit} bytes allocated; {nbytes} more do not fit"
            )
        self.allocated_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def free(self, storage: torch.UntypedStorage, history: History) -> None:
        """Give memory back to the compute stream, which may use it at once. Finalizers call this: it never raises."""
        with self.lock:
            self.allocated_bytes -= history.nbytes
            ctypes.memset(storage.data_ptr(), _POISON, history.nbytes)
            if torch.get_device_module("sim").active is self:
                clock = _join(self.compute_stream.clock, self.host_clock)
                self._note(history, 0, history.nbytes, Access(self.compute_stream, clock, "the freeing"), is_write=True)

    def touch(self, tensor: SimTensor, stream: SimStream, what: object, is_write: bool) -> None:
        """Account for an access to the bytes of `tensor`, submitted to `stream` now.

        Raises:
            RaceError: it races with an earlier access, and `raise_races` asks to raise here.
        """
        start, stop = _byte_range(tensor.raw)
        if start == stop:
            return
        with self.lock:
            is_race = self._note(tensor.memory.history, start, stop, stream.access(what), is_write)
        if is_race:
            self._raise_here()

    def _note(self, history: History, start: int, stop: int, access: Access, is_write: bool) -> bool:
        """Note an access; returns whether it races."""
        earlier = (history.write if is_write else history.read)(start, stop, access)
        if earlier is not None:
            where = f"bytes [{start}, {stop}) of an allocation of {history.nbytes}"
            self._keep(f"race: {access} touches {where}, and nothing orders it behind {earlier}")
        return earlier is not None

    def _keep(self, race: str) -> None:
        self.races.append(race)
        self._unraised.append(race)

    def _raise_here(self) -> None:
        if self._raise_races and threading.current_thread() is threading.main_thread():
            self.check()


def _byte_range(raw: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor extends over, holes included."""
    if raw.numel() == 0:
        return 0, 0
    first = int(raw.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(raw.shape, raw.stride(), strict=True))
    return first * raw.itemsize, (last + 1) * raw.itemsize


class SimTensor(torch.Tensor):
    """A tensor on `sim:0`: a wrapper in the shape of `raw`, the CPU tensor that holds the bytes."""

    raw: torch.Tensor
    memory: Memory

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # what torch documents

    @staticmethod
    def __new__(cls, raw: torch.Tensor, memory: Memory) -> SimTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=memory.sim.device
        )
        tensor.raw, tensor.memory = raw, memory
        return tensor

    @classmethod
    # the stub says that a class method has no class
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is not _ATTENTION and func._can_decompose():  # reaches us in inference mode only
            return func.decompose(*args, **kwargs or {})
        return _Operation(func, args, kwargs or {}).run()

    def __repr__(self) -> str:  # type: ignore[override]  # torch's has an argument of its own
        return f"SimTensor({self.raw!r})"

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), self.clone())  # torch would follow `data_ptr` into a storage that is not there

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise NotImplementedError("sim: assigning to .data would leave `raw` behind; assign a new Parameter instead")


class _Operation:
    """One torch operation with a `SimTensor` among its operands, run on the CPU as work of the compute stream."""

    def __init__(self, func: OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.operands = list(self._find_operands())
        self.sim = next(tensor.memory.sim for tensor, _ in self.operands if isinstance(tensor, SimTensor))
        self.leaves_sim = torch.device(kwargs.get("device") or "sim").type != "sim"

    def run(self) -> Any:
        self._refuse_mixed_devices()
        with self.sim.lock:
            for tensor, is_write in self.operands:
                if isinstance(tensor, SimTensor) and not self.func.is_view:
                    self.sim.touch(tensor, self.sim.compute_stream, self.func, is_write)
            if not self.func.is_view:
                self.sim.compute_stream.spend(self.sim.kernel_seconds)
            result = self._run_on_cpu()
            point = self.sim.compute_stream.mark() if self._blocks_host() else None
            wrapped = result if self.leaves_sim else tree_map(self._wrap, result)
        if point is not None:
            point.sleep()
            with self.sim.lock:
                self.sim.wait_on_host(point)
        return wrapped

    def _find_operands(self) -> Iterator[tuple[torch.Tensor, bool]]:
        """Each tensor that goes in, and whether it is written."""
        parameters = _parameters(self.func)
        values = {name: value for (name, _), value in zip(parameters, self.args, strict=False)} | self.kwargs
        for name, is_write in parameters:
            value = values.get(name)
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, torch.Tensor):
                    yield item, is_write

    def _refuse_mixed_devices(self) -> None:
        """As CUDA does: but for transfers, only scalars and indices may be elsewhere."""
        if self.func in _TRANSFERS or self.func.overloadpacket in _TAKE_HOST_INDICES:
            return
        if any(tensor.dim() and not isinstance(tensor, SimTensor) for tensor, _ in self.operands):
            devices = " and ".join(sorted({str(tensor.device) for tensor, _ in self.operands}))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {self.func} got {devices}")

    def _run_on_cpu(self) -> Any:
        kwargs = self.kwargs
        if "device" in kwargs and not self.leaves_sim:
            kwargs = {**kwargs, "device": "cpu"}
        args, kwargs = tree_map(_raw, (self.args, kwargs))
        return _STAND_INS.get(self.func, self.func)(*args, **kwargs)

    def _blocks_host(self) -> bool:
        """Whether the host takes a value from the device or asked for a blocking transfer, as on CUDA."""
        if self.func in _TRANSFERS:
            return self._account_transfer() and not self.kwargs.get("non_blocking", self.args[2:] == (True,))
        return torch.Tag.data_dependent_output in self.func.tags

    def _account_transfer(self) -> bool:
        """Count what came from the host; returns whether anything went between host and device at all."""
        if self.func is aten.copy_.default:
            is_to_sim, source = isinstance(self.args[0], SimTensor), self.args[1]
        else:
            is_to_sim, source = not self.leaves_sim, self.args[0]
        crosses = is_to_sim != isinstance(source, SimTensor) and source.numel() > 0
        self.sim.h2d_bytes += source.nbytes if crosses and is_to_sim else 0
        return crosses

    def _wrap(self, raw: Any) -> Any:
        """A result as the device has it: the operand that it is, a view of an operand's memory, or new memory."""
        if not isinstance(raw, torch.Tensor):
            return raw
        for tensor, _ in self.operands:
            if _raw(tensor) is raw:
                return self._same_shape(tensor)
        for tensor, _ in self.operands:
            if isinstance(tensor, SimTensor) and _storage_id(tensor.raw) == _storage_id(raw):
                return SimTensor(raw, tensor.memory)
        return self.sim.adopt(raw, self.func)

    def _same_shape(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, unless more than its bytes has changed: the shape of a wrapper is fixed."""
        raw = _raw(tensor)
        if (tensor.shape, tensor.stride()) != (raw.shape, raw.stride()):
            raise NotImplementedError(f"sim: {self.func} changes the shape of a tensor in place")
        return tensor


@functools.cache
def _parameters(func: OpOverload[..., Any]) -> list[tuple[str, bool]]:
    """The names of the parameters of `func`, each with whether `func` writes to what is passed."""
    return [(each.name, each.alias_info is not None and each.alias_info.is_write) for each in func._schema.arguments]


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, SimTensor) else value


def _storage_id(raw: torch.Tensor) -> int:
    return raw.untyped_storage()._cdata


def _integer_histc(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.histc(tensor.double(), *args, **kwargs).to(tensor.dtype)


_STAND_INS: dict[Any, Callable[..., Any]] = {aten.histc.default: _integer_histc}
"""For what transformers calls on any accelerator and the CPU cannot do."""


class _DeviceModule(_DummyBackendModule):
    """What torch finds as `torch.sim`; knows the `SimDevice` in use, whichever copy of this module it comes from."""

    active: SimDevice | None = None

    def __init__(self) -> None:
        self.kernels = torch.library.Library("aten", "IMPL")  # they last as long as it does

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def _register() -> None:
    """Make `sim` a device of torch; once per process, even if this module is imported twice."""
    if hasattr(torch, "sim"):
        return
    module = _DeviceModule()
    _setup_privateuseone_for_python_backend("sim", backend_module=module)
    for factory in _FACTORIES:
        module.kernels.impl(factory, functools.partial(_create, factory), "PrivateUse1")
    module.kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    module.kernels.impl(_ATTENTION, _never_called, "PrivateUse1")


def _create(func: OpOverload[..., Any], *args: Any, device: Any, pin_memory: Any = None, **kwargs: Any) -> SimTensor:
    """What a factory function does when its device is `sim`."""
    sim: SimDevice | None = torch.get_device_module("sim").active
    if sim is None:
        raise RuntimeError("sim:0 has no memory outside of `with SimDevice():`")
    return sim.adopt(func(*args, device="cpu", **kwargs), func)


def _copy_from(source: torch.Tensor, destination: SimTensor, non_blocking: bool = False) -> SimTensor:
    """The copy inside `torch.tensor(..., device="sim")`, which comes past `__torch_dispatch__`."""
    copy = aten.copy_.default
    return cast(SimTensor, destination.__torch_dispatch__(copy, (), (destination, source, non_blocking)))


def _never_called(*_: Any, **__: Any) -> torch.Tensor:
    """Registered so that torch leaves attention whole: the CPU's own kernel then gives the CPU's own bits."""
    raise NotImplementedError("__torch_dispatch__ comes first")


class SimRuntime:
    """The `Runtime` of a `SimDevice`.

    Args:
        pinnable: whether host memory can be pinned. Copies are late either way.
    """

    def __init__(self, sim: SimDevice, pinnable: bool = True) -> None:
        self.device = sim.device
        self._sim = sim
        self._pinnable = pinnable

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pin(self, buffer: HostBuffer) -> bool:
        if self._pinnable:
            self._sim.pin(buffer.nbytes)
        return self._pinnable

    def unpin(self, buffer: HostBuffer) -> None:
        self._sim.unpin(buffer.nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Queue a copy, which reads `source` when it runs: when somebody waits for it. Keep `source` until then.

        Raises:
            ValueError: these are not as many contiguous bytes on the CPU as on the device.
        """
        if not isinstance(destination, SimTensor) or source.device.type != "cpu":
            raise ValueError(f"copies go from cpu to sim:0, not from {source.device} to {destination.device}")
        for tensor in (destination, source):
            if tensor.dtype != torch.uint8 or not tensor.is_contiguous() or tensor.nbytes != source.nbytes:
                raise ValueError(f"{tuple(tensor.shape)} of {tensor.dtype} is not {source.nbytes} contiguous bytes")
        self._sim.copy(destination, source, cast(SimStream, stream))

    def compute(
        self,
        destination: torch.Tensor,
        source: torch.Tensor,
        work: Callable[[torch.Tensor, torch.Tensor], None],
        stream: Stream,
    ) -> None:
        """Queue `work(destination, source)`, which runs when somebody waits for it."""
        if not (isinstance(destination, SimTensor) and isinstance(source, SimTensor)):
            raise ValueError(f"computations are of sim:0, not of {source.device} and {destination.device}")
        self._sim.compute(destination, source, work, cast(SimStream, stream))

    def new_stream(self) -> SimStream:
        return self._sim.new_stream("copy")

    def new_event(self) -> SimEvent:
        return SimEvent(self._sim)

    def new_timer(self) -> SimEvent:
        return SimEvent(self._sim)

    def elapsed_seconds(self, start: SimEvent, end: SimEvent) -> float:
        assert start.point is not None
        assert end.point is not None
        return end.point.at - start.point.at

    def used_bytes(self) -> int:
        return self._sim.allocated_bytes

    def peak_bytes(self) -> int:
        return self._sim.peak_bytes

    def forget_peak(self) -> None:
        self._sim.peak_bytes = self._sim.allocated_bytes

    def compute_stream(self) -> SimStream:
        return self._sim.compute_stream

    def synchronize(self) -> None:
        self._sim.synchronize()
