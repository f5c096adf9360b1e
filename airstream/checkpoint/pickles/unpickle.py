"""This finds out what a pickle of weights says without running it: it makes descriptions of tensors and no more.

Python's unpickler calls whatever a file names. torch's own `weights_only` one calls a list of functions that are safe,
some of which still allocate what a file claims (`bytearray(10**12)` is on the list). This one calls nothing from the
file: it knows the instructions that `torch.save` writes, and a table of names that stand for descriptions. Any other
name is refused when it is read, whether or not it would have been called.

It knows neither where storages lie nor whether they are there: `tensors` does.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from airstream.checkpoint.pickles.described import KNOWN_NAMES, PickledStorage, described_storage, make
from airstream.errors import CheckpointError
from airstream.reporting.units import counted

MAX_PICKLE_BYTES = 8 << 20
MAX_WORK = 1_000_000
"""Of instructions, and of what some of them do besides: one for each value that a call looks at, one for every
`TEXT_BYTES` of a text. A tensor takes about 55 in 150 bytes: room for 18,000 in one file. Objects take up to 88 bytes
each."""

SMALL_WORK = 1000
"""Of a pickle that holds a number or two."""

MAX_TEXT_BYTES = 1 << 20
TEXT_BYTES = 16
CALL_WORK = 4
"""What checking a description takes, beside its sizes."""

MAX_ARGUMENTS = 16
"""Of a call. `torch.save` writes nine at most."""


def unpickle(
    stream: BinaryIO, source: Path, storages: dict[str, PickledStorage] | None = None, max_work: int | None = None
) -> Any:
    """The object pickled at the position of `stream`, which is left behind it: tensors and storages as descriptions.

    Args:
        storages: takes every storage that is mentioned, by its key.
        max_work: that it may take, `MAX_WORK` if not given.

    Raises:
        CheckpointError: it is not a pickle of weights. Nothing was executed, and nothing large allocated.
    """
    return _Machine(stream, source, {} if storages is None else storages, max_work or MAX_WORK).run()


class _Machine:
    def __init__(self, stream: BinaryIO, source: Path, storages: dict[str, PickledStorage], max_work: int) -> None:
        self._stream = stream
        self._source = source
        self._storages = storages
        self._bytes_left = MAX_PICKLE_BYTES
        self._work_left = max_work
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            while True:
                code = self._take(1)
                if code == pickle.STOP:
                    return self._stack.pop()
                instruction = _INSTRUCTIONS.get(code)
                if instruction is None:
                    raise ValueError(f"instruction {code!r} is not one that torch.save writes")
                self._spend(1)
                instruction(self)
        except CheckpointError:
            raise
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
            raise CheckpointError(
                f"{self._source} is not a pickle of weights ({error}); nothing of it was executed. Download it again"
            ) from None

    def _spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise ValueError("it takes more instructions than any list of tensors")

    # ------------------------------------------------------------------------------------------------------- reading

    def _take(self, count: int) -> bytes:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise ValueError(f"it takes more than {MAX_PICKLE_BYTES:,} bytes")
        data = self._stream.read(count)
        if len(data) != count:
            raise ValueError("the file ends within it")
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, form: str) -> str:
        count = self._number(form)
        if count > MAX_TEXT_BYTES:
            raise ValueError(f"a text of {counted(count, 'byte')}")
        self._spend(count // TEXT_BYTES)
        return self._take(count).decode("utf-8")

    def _line(self) -> str:
        line = self._stream.readline(256)
        self._bytes_left -= len(line)
        if not line.endswith(b"\n"):
            raise ValueError("a name that does not end")
        return line[:-1].decode("utf-8")

    # -------------------------------------------------------------------------------------------------- instructions

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def tuple_of_marked(self) -> None:
        items = self._marked()
        self.push(tuple(items))

    def tuple_of(self, count: int) -> None:
        items = [self._stack.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append(self) -> None:
        value = self._stack.pop()
        self._top(list).append(value)

    def extend(self) -> None:
        values = self._marked()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set(key, value)

    def set_items(self) -> None:
        items = self._marked()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def put(self, form: str) -> None:
        self._memo[self._number(form)] = self._stack[-1]

    def get(self, form: str) -> None:
        self.push(self._memo[self._number(form)])

    def long(self) -> None:
        self.push(int.from_bytes(self._take(self._number("B")), "little", signed=True))

    def name(self) -> None:
        full = f"{self._line()}.{self._line()}"
        if full not in KNOWN_NAMES:
            raise CheckpointError(
                f"{self._source} refers to {full!a:.200}, which has no place among weights. Nothing was executed. "
                "Load this file in no other way unless you trust whoever made it"
            )
        self.push(KNOWN_NAMES[full])

    def storage(self) -> None:
        storage = described_storage(*self._arguments(self._stack.pop()))
        self._storages[storage.key] = storage
        self.push(storage)

    def call(self) -> None:
        arguments, function = self._arguments(self._stack.pop()), self._stack.pop()
        self.push(make(function, arguments))

    def _arguments(self, arguments: Any) -> tuple[Any, ...]:
        """What a call is given, which may have been made once and be looked at again and again."""
        if type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:
            raise ValueError("a call without a list of arguments, or with one longer than any")
        self._spend(CALL_WORK + sum(len(value) for value in arguments if type(value) in (list, tuple, dict)))
        return arguments

    def build(self) -> None:
        self._stack.pop()  # attributes: what torch adds to state dicts and tensors, of no use here

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise TypeError(f"a {kind.__name__} was expected")
        return self._stack[-1]

    def _set(self, key: Any, value: Any) -> None:
        if type(key) not in (str, int):  # the hash of a tuple within tuples overflows the stack
            raise TypeError("a key that is neither text nor a number")
        self._top(dict)[key] = value


_INSTRUCTIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda m: None if m._number("B") == 2 else _refuse_protocol(),
    pickle.MARK: _Machine.mark,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m._number("<i")),
    pickle.BININT1: lambda m: m.push(m._number("B")),
    pickle.BININT2: lambda m: m.push(m._number("<H")),
    pickle.LONG1: _Machine.long,
    pickle.BINFLOAT: lambda m: m.push(m._number(">d")),
    pickle.BINUNICODE: lambda m: m.push(m._text("<I")),
    pickle.SHORT_BINSTRING: lambda m: m.push(m._text("B")),
    pickle.BINSTRING: lambda m: m.push(m._text("<I")),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.TUPLE: _Machine.tuple_of_marked,
    pickle.TUPLE1: lambda m: m.tuple_of(1),
    pickle.TUPLE2: lambda m: m.tuple_of(2),
    pickle.TUPLE3: lambda m: m.tuple_of(3),
    pickle.APPEND: _Machine.append,
    pickle.APPENDS: _Machine.extend,
    pickle.SETITEM: _Machine.set_item,
    pickle.SETITEMS: _Machine.set_items,
    pickle.BINPUT: lambda m: m.put("B"),
    pickle.LONG_BINPUT: lambda m: m.put("<I"),
    pickle.BINGET: lambda m: m.get("B"),
    pickle.LONG_BINGET: lambda m: m.get("<I"),
    pickle.GLOBAL: _Machine.name,
    pickle.BINPERSID: _Machine.storage,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.build,
}


def _refuse_protocol() -> None:
    raise ValueError("its protocol is not the one that torch.save writes")
