"""This says which tensor lies where in a GGUF checkpoint. Headers are read and checked before anything else happens.

It knows the format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: little-endian; counts, metadata, a table
of tensors, then their data) and its files split in several. It reads headers only, and of the metadata keeps only what
says where tensors are; what it says about the model is for transformers to read. Nothing a header claims is believed
before it has been held against the file, and nothing is allocated for a claim.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airstream.checkpoint.gguf_split import split_files
from airstream.checkpoint.stored import ITEM_BYTES, CheckpointIndex, StoredTensor
from airstream.codecs.block_types import BLOCK_TYPES
from airstream.errors import CheckpointError, UnsupportedError
from airstream.reporting.units import counted, format_bytes, round_up
from airstream.system.foreign_files import mapped
from airstream.system.impostors import HEAD_BYTES, complaint

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_NAME_BYTES, MAX_DIMENSIONS = 65535, 4
MAX_ARRAY_DEPTH = 4

MAX_TENSORS = 65_536
"""In one file. Experts are merged, so that the largest models have a few thousand."""

MAX_WORK = 2_000_000
"""Values of metadata that have to be gone past one by one, and bytes of names over 16. The largest vocabularies have
262,144 entries and twice as many merges."""

MAX_ALIGNMENT = 1 << 20
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}

TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Names of the types, by their number: airstream's own for plain numbers, those of `BLOCK_TYPES` for blocks."""

_Entry = tuple[str, tuple[int, ...], str, int]  # name, shape as in torch, type and offset of a tensor
KEPT = ("general.architecture", "general.alignment", "split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One entry of the metadata: the bytes of the file that hold it, and of an array how many values it has."""

    key: str
    begin: int
    end: int
    num_values: int = 1


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """One file: what it says about itself, and its tensors in file order."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]
    entries: tuple[GgufEntry, ...]


class GgufIndex(CheckpointIndex):
    """The tensors of a GGUF checkpoint by their names in it.

    Attributes:
        first: the file that has the model's description, and some or all of its tensors.
        architecture: what the file calls the kind of model.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], first: Path, architecture: str) -> None:
        super().__init__(tensors)
        self.first = first
        self.architecture = architecture

    @classmethod
    def open(cls, file: Path) -> GgufIndex:
        """Read and check the headers of the checkpoint that `file` belongs to: the file, or all files it is split in.

        Raises:
            CheckpointNotFoundError: there is no such file, or one of those it is split in is missing.
            CheckpointError: a file is truncated or malformed; nothing was loaded.
            UnsupportedError: a tensor is of a type that cannot be streamed.
        """
        files = split_files(file)
        headers = [read_gguf_header(part) for part in files]
        tensors: dict[str, StoredTensor] = {}
        for number, header in enumerate(headers):
            _check_split(header, number, len(files))
            for tensor in header.tensors:
                if tensor.name in tensors:
                    other = tensors[tensor.name].file.name
                    raise CheckpointError(f"tensor {tensor.name!r} is in two files, {other} and {header.file.name}")
                tensors[tensor.name] = tensor
        architecture = headers[0].metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{files[0]} does not say what kind of model it holds (general.architecture)")
        promised = headers[0].metadata.get("split.tensors.count", len(tensors))
        if promised != len(tensors):
            raise CheckpointError(f"{files[0]} promises {promised!r} as its number of tensors, and has {len(tensors)}")
        return cls(tensors, files[0], architecture)


def read_gguf_header(file: Path) -> GgufHeader:
    """The header of one file, with every claim of it checked against the file."""
    with mapped(file) as data:
        if said := complaint(file, data[:HEAD_BYTES], "gguf"):
            raise CheckpointError(said)
        return _Parser(file, data).header()


class _Parser:
    """Walks the header of `data`, the file's bytes. Whatever it does not find as it should be is a CheckpointError."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file = file
        self._data = data
        self._size = len(data)
        self._position = 0
        self._work_left = MAX_WORK

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise self._fault("it does not begin like a GGUF file")
        version = self._number("<I")
        if version not in VERSIONS:
            kind = "is for big-endian machines" if version & 0xFFFF == 0 else f"is of version {version}"
            raise self._fault(f"it {kind}; versions {VERSIONS[0]} and {VERSIONS[1]}, little-endian, can be read")
        num_tensors, num_entries = self._number("<Q"), self._number("<Q")
        metadata, entries = self._metadata(num_entries)
        self._check_count(num_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        if num_tensors > MAX_TENSORS:
            raise self._fault(f"it claims {counted(num_tensors, 'tensor')}; no file has more than {MAX_TENSORS:,}")
        table = [self._entry() for _ in range(num_tensors)]
        return GgufHeader(self._file, metadata, self._placed(table, metadata), entries)

    def _metadata(self, num_entries: int) -> tuple[dict[str, Any], tuple[GgufEntry, ...]]:
        """The values that are kept, and where all entries lie."""
        self._check_count(num_entries, 8 + 4 + 1, "metadata entries")
        entries: dict[str, GgufEntry] = {}
        kept: dict[str, Any] = {}
        self._spend(num_entries)
        for _ in range(num_entries):
            begin, num_values = self._position, 1
            key = self._name()
            if key in entries:
                raise self._fault(f"its metadata has {key!r} twice")
            kind = self._number("<I")
            if key in KEPT:
                if kind != STRING and kind not in SCALARS:
                    raise self._fault(f"its {key} is of type {kind}: a number or a string was expected")
                kept[key] = self._name() if kind == STRING else self._number(SCALARS[kind])
            else:
                num_values = self._skip(kind, depth=0)
            entries[key] = GgufEntry(key, begin, self._position, num_values)
        return kept, tuple(entries.values())

    def _entry(self) -> _Entry:
        name = self._name()
        num_dimensions = self._number("<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._fault(f"tensor {name!r} has {counted(num_dimensions, 'dimension')}")
        shape = tuple(self._number("<Q") for _ in range(num_dimensions))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        if number not in TYPES:
            raise UnsupportedError(
                f"{self._file}: tensor {name!r} is of GGUF type {number}, which airstream does not know. "
                f"Use a file of another type: {', '.join(sorted(TYPES.values()))}"
            )
        return name, shape, TYPES[number], offset

    def _placed(self, table: list[_Entry], metadata: Mapping[str, Any]) -> tuple[StoredTensor, ...]:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._fault(f"its alignment is {alignment!r}: not a power of two from 8 to {MAX_ALIGNMENT:,}")
        start = round_up(self._position, alignment)
        tensors = []
        for name, shape, dtype, offset in table:
            if offset % alignment:
                raise self._fault(f"tensor {name!r} begins at byte {offset:,} of the data, off {alignment}")
            nbytes = self._nbytes(name, shape, dtype)
            place = (name, self._file, start + offset, nbytes, dtype, shape)
            tensors.append(StoredTensor(*place, resident_offset=0, block=BLOCK_TYPES.get(dtype)))
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.end))
        self._check_places(tensors, start)
        return tuple(tensors)

    def _nbytes(self, name: str, shape: tuple[int, ...], dtype: str) -> int:
        if dtype in ITEM_BYTES:
            return math.prod(shape) * ITEM_BYTES[dtype]
        block = BLOCK_TYPES[dtype]
        if shape[-1] % block.elements:
            raise self._fault(f"tensor {name!r} {list(shape)} has rows that are not whole {dtype} blocks")
        return math.prod(shape) // block.elements * block.nbytes

    def _check_places(self, tensors: list[StoredTensor], start: int) -> None:
        end, previous = start, "the header"
        names: set[str] = set()
        for tensor in tensors:
            if tensor.name in names:
                raise self._fault(f"tensor {tensor.name!r} is in it twice")
            names.add(tensor.name)
            if tensor.offset < end:
                raise self._fault(f"tensor {tensor.name!r} overlaps {previous}")
            end, previous = tensor.end, tensor.name
        if end > self._size:
            raise CheckpointError(
                f"{self._file} is truncated: its header describes {counted(end, 'byte')} ({format_bytes(end)}), the "
                f"file has {self._size:,}. Download it again"
            )

    def _skip(self, kind: int, depth: int) -> int:
        """Go past a value, and tell how many values it consists of."""
        if kind == STRING:
            self._take_over(self._number("<Q"))
        elif kind == ARRAY:
            return self._skip_array(depth)
        elif kind in SCALARS:
            self._take_over(struct.calcsize(SCALARS[kind]))
        else:
            raise self._fault(f"its metadata has a value of type {kind}, which there is none of")
        return 1

    def _skip_array(self, depth: int) -> int:
        if depth == MAX_ARRAY_DEPTH:
            raise self._fault(f"its metadata has arrays more than {MAX_ARRAY_DEPTH} deep")
        kind, count = self._number("<I"), self._number("<Q")
        if kind in SCALARS:
            self._take_over(count * struct.calcsize(SCALARS[kind]))
            return count
        self._check_count(count, 8, "values")
        self._spend(count)
        for _ in range(count):
            self._skip(kind, depth + 1)
        return count

    def _name(self) -> str:
        length = self._number("<Q")
        if length > MAX_NAME_BYTES:
            raise self._fault(f"a name at byte {self._position:,} claims {counted(length, 'byte')}")
        self._spend(length // 16)
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._fault(f"a name at byte {self._position:,} is not UTF-8") from None

    def _number(self, pattern: str) -> Any:
        start = self._position
        self._take_over(struct.calcsize(pattern))
        return struct.unpack_from(pattern, self._data, start)[0]

    def _take(self, nbytes: int) -> bytes:
        start = self._position
        self._take_over(nbytes)
        return self._data[start : start + nbytes]

    def _take_over(self, nbytes: int) -> None:
        if nbytes > self._size - self._position:
            raise self._fault(f"it ends at byte {self._size:,}, where its header goes on for {nbytes:,} more")
        self._position += nbytes

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        """`count` things of at least `least_bytes` each must fit into the rest of the file."""
        if count * least_bytes > self._size - self._position:
            raise self._fault(f"it claims {count:,} {what}, more than its {counted(self._size, 'byte')} can hold")

    def _spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise self._fault(f"its header goes on for more than {MAX_WORK:,} values")

    def _fault(self, what: str) -> CheckpointError:
        what = what if len(what) < 500 else f"{what[:500]} ..."  # names are as long as their file likes
        return CheckpointError(f"{self._file} is not a sound GGUF file: {what}. Download it again")


def _check_split(header: GgufHeader, number: int, count: int) -> None:
    claimed, own = header.metadata.get("split.count", count), header.metadata.get("split.no", number)
    if claimed in (0, count) and (count == 1 or own == number):
        return
    if not isinstance(own, int):
        raise CheckpointError(f"{header.file} is not a sound GGUF file: split.no is {own!r}. Download it again")
    raise CheckpointError(
        f"{header.file} says that it is file {own + 1} of {claimed}, its name that it is file {number + 1} of {count}: "
        "give the files the names that they were published with"
    )
