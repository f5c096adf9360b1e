"""This reads the zip archives that `torch.save` writes: where each record lies. It reads headers only.

It knows that torch stores records as they are, so that what the archive holds can be read in place. An archive whose
records are compressed, overlap, or lie elsewhere than it says is refused.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from airstream.errors import CheckpointError
from airstream.reporting.units import counted

MAX_DIRECTORY_BYTES = 4 << 20
"""Of the list of records at the end of the file: about 100 bytes each, or 46, which take 700 of memory."""

MAX_NAME_BYTES = 4096
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_SIGNATURE = b"PK\x03\x04"
ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class Record:
    """`nbytes` bytes at `offset` of the file."""

    offset: int
    nbytes: int


def read_records(stream: BinaryIO, source: Path) -> dict[str, Record]:
    """The records of a torch archive by name, without the folder they all lie in: "data.pkl", "data/0", "byteorder".

    Raises:
        CheckpointError: it is not such an archive, or what it says of its records is not true of the file.
    """
    try:
        with zipfile.ZipFile(_Bounded(stream)) as archive:  # which reads, seeks and tells: enough
            entries, end = archive.infolist(), archive.start_dir
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(f"{source} is a TorchScript program, not a checkpoint: airstream executes none")
        records = _checked(stream, entries, end)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError) as error:
        raise CheckpointError(f"{source} is not a complete archive of torch ({error}). Download it again") from None
    return _without_folder(records, source)


class _Bounded:
    """A stream that refuses to be read in pieces larger than a directory may be."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell
        self.seekable = stream.seekable

    def read(self, count: int = -1) -> bytes:
        place = self._stream.tell()
        left = self._stream.seek(0, os.SEEK_END) - place
        self._stream.seek(place)
        count = left if count < 0 else min(count, left)
        if count > MAX_DIRECTORY_BYTES:
            raise ValueError(f"its directory has {counted(count, 'byte')}")
        return self._stream.read(count)


def _checked(stream: BinaryIO, entries: list[zipfile.ZipInfo], end: int) -> dict[str, Record]:
    """The records of `entries`, which have to lie one behind the other, before `end`."""
    records: dict[str, Record] = {}
    previous = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = entry.orig_filename
        if name in records:
            raise ValueError(f"it has two records {name!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
            raise ValueError(f"record {name!r} is compressed or encrypted, as torch.save never does: save it again")
        if entry.file_size != entry.compress_size or entry.header_offset < previous:
            raise ValueError(f"record {name!r} overlaps another one, or has two sizes")
        offset = _data_offset(stream, entry)
        previous = offset + entry.file_size
        if previous > end:
            raise ValueError(f"record {name!r} ends at {previous:,}, behind the data, which ends at {end:,}")
        records[name] = Record(offset, entry.file_size)
    return records


def _data_offset(stream: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the data of `entry` begins: behind a header of its own, which has to agree."""
    stream.seek(entry.header_offset)
    header = stream.read(_LOCAL_HEADER.size)
    signature, _, flags, method, *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    name = stream.read(min(name_bytes, MAX_NAME_BYTES))
    if signature != _LOCAL_SIGNATURE or name != _encoded(entry) or method != zipfile.ZIP_STORED or flags & ENCRYPTED:
        raise ValueError(f"the header of record {entry.orig_filename!r} is not where the directory says")
    return int(entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes)


def _encoded(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")


def _without_folder(records: Mapping[str, Record], source: Path) -> dict[str, Record]:
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{source} is an archive, but not one that torch.save has written: it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    return {name.removeprefix(folder): record for name, record in records.items() if name.startswith(folder)}
