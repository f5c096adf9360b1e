"""This makes the outline of a GGUF file: what it says of the model, without its vocabulary and without its weights.

Readers of metadata look at every word of a vocabulary, which takes them a minute for a large one. What they make of the
outline is what they would make of the file: all entries but the long lists are there, byte for byte, and all tensors by
name. It refuses to know what any of it means.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from airstream.checkpoint.gguf import ARRAY, MAGIC, STRING, GgufEntry, read_gguf_header
from airstream.system.foreign_files import mapped

LONG = 4096
"""Values from which on a list is left out. Lists that say something of every layer are shorter."""

VOCABULARY = "tokenizer.ggml.tokens"
"""Of this list its length matters: it is the size of the vocabulary where nothing else says that."""

F32 = 0
ALIGNMENT = 32


def write_outline(file: Path, outline: Path) -> None:
    """Write to `outline` what `file` says, in a few hundred kilobytes.

    Raises:
        CheckpointError: `file` is not a sound GGUF file.
    """
    header = read_gguf_header(file)
    with mapped(file) as data:
        (version,) = struct.unpack_from("<I", data, len(MAGIC))
        entries = [_outlined(entry, data) for entry in header.entries]
    entries = [entry for entry in entries if entry]
    table = [_string(tensor.name) + struct.pack("<IQIQ", 1, 1, F32, 0) for tensor in header.tensors]
    counts = MAGIC + struct.pack("<IQQ", version, len(table), len(entries))
    outline.write_bytes(b"".join([counts, *entries, *table, bytes(2 * ALIGNMENT)]))


def _outlined(entry: GgufEntry, data: mmap.mmap) -> bytes:
    """The bytes of `entry`; none of a long list.

    transformers takes a list of one value for that value, and what it asks of the vocabulary is its length. So a
    vocabulary is one word of as many letters as there are words.
    """
    if entry.num_values < LONG:
        return data[entry.begin : entry.end]
    if entry.key == VOCABULARY:
        return _string(entry.key) + struct.pack("<IIQ", ARRAY, STRING, 1) + _string(" " * entry.num_values)
    return b""


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
