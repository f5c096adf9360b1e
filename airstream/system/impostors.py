"""This says what a file is that is not what its name says, and what to type then: pointers, web pages, other formats.

It knows how files begin. It refuses to know whether the rest of a file is sound.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

HEAD_BYTES = 512
"""That are looked at."""

FORMATS: Mapping[str, tuple[bytes, ...]] = {
    "safetensors": (rb".{7}\0\{",),
    "gguf": (rb"GGUF",),
    "pickle": (rb"PK\x03\x04.{26}[^\0]{1,200}/(data\.pkl|data/|byteorder|version|\.format_version)", rb"\x80[\2-\5]"),
}
"""How checkpoints begin, by format."""

AS_WHAT: Mapping[str, str] = {
    "safetensors": "a safetensors file: rename it to end in .safetensors",
    "gguf": "a GGUF file: rename it to end in .gguf, and load it by the name of the file",
    "pickle": "a checkpoint that torch.save has written: rename it to pytorch_model.bin",
}

LFS_POINTER = b"version https://git-lfs"
POINTER = "a pointer that git-lfs left in place of the file. Fetch the file: git lfs install && git lfs pull"
AGAIN = "Download it again: hf download REPOSITORY --local-dir FOLDER"

KINDS: tuple[tuple[bytes, str], ...] = (
    (LFS_POINTER, POINTER),
    (rb"\s*(?i:<!doctype html|<html|<head|<!--)", f"a web page, as a login or an error of a server gives. {AGAIN}"),
    (rb"\s*<(\?xml|Error>)", f"a message of a server, in XML. {AGAIN}"),
    (rb"\x1f\x8b", "compressed with gzip: unpack it with gunzip"),
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive: unpack it with unzip"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it with unzstd"),
    (rb"\xfd7zXZ\0", "compressed with xz: unpack it with unxz"),
    (rb"BZh[1-9]1AY", "compressed with bzip2: unpack it with bunzip2"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it with 7z x"),
    (rb".{257}ustar", "a tar archive: unpack it with tar -xf"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as TensorFlow and Keras write: use the repository's safetensors files"),
    (rb"(tjgg|fmgg|lmgg|algg)", "a GGML file from before GGUF: use a GGUF file of the model"),
    (rb"\0{64,}\Z", f"a file that begins with zeros: room was made for it, and nothing written. {AGAIN}"),
    (rb"\s*\{.*\"(error|message|detail)\"", f"a message of a server, in JSON. {AGAIN}"),
    (rb"[\t\n\r\x20-\x7e]{1,512}\Z", f"text, not what its name says. {AGAIN}"),
)
"""How files begin that are no checkpoints, and what they are. The first that fits counts."""


def what_it_is(head: bytes, wanted: str) -> str | None:
    """What a file that begins with `head` is; None if it may be of format `wanted`, or nothing can be said.

    Args:
        head: its first `HEAD_BYTES`, or all of it.
        wanted: a format, or "" for one that is none of weights.
    """
    if not head:
        return f"empty: it was never written, or the disk was full. {AGAIN}"
    for name, starts in FORMATS.items():
        if any(re.match(start, head, re.DOTALL) for start in starts):
            return None if name == wanted else AS_WHAT[name]
    return next((kind for start, kind in KINDS if re.match(start, head, re.DOTALL)), None)


def complaint(file: Path, head: bytes, wanted: str) -> str | None:
    """A sentence about `file`, which begins with `head` and should be of format `wanted`; None if there is none."""
    kind = what_it_is(head, wanted)
    return None if kind is None else f"{file} is {kind}"
