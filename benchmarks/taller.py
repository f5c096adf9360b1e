"""Write a checkpoint with more layers than there is disk for: they share the blocks of those of a smaller one.

    python -m benchmarks.taller SMALL OUT 80

Layer n of OUT has the bytes of layer n modulo the layers of SMALL, by the file system's own links between parts of
files (FICLONERANGE: xfs with reflinks, btrfs). To whoever reads it, it is an ordinary checkpoint of 80 files, and reads
around the page cache come from the disk each time; but the disk below may know that it has read them before, which a
figure made so has to say.

Both folders have to be on one such file system, and the tensors of a layer follow each other in the files of SMALL.
What torchao wrote has more in its headers than tensors, and is not linked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such links
    fcntl = None  # type: ignore[assignment]

CLONE_RANGE = 0x4020940D
BLOCK_BYTES = 4096
INDEX_NAME = "model.safetensors.index.json"
LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")

Header = dict[str, Any]


def read_header(file: Path) -> tuple[Header, int]:
    """The tensors of a safetensors file, and where their bytes begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def runs(folder: Path) -> Iterator[tuple[Path, int | None, Header, int]]:
    """Of every file: a layer's number (None: what is in no layer), its tensors, counted from the run, and where it is.

    Raises:
        ValueError: the tensors of a layer are not one run of bytes.
    """
    for file in sorted(folder.glob("*.safetensors")):
        header, start = read_header(file)
        by_layer: dict[int | None, Header] = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            found = LAYER.search(name)
            by_layer.setdefault(int(found.group()) if found else None, {})[name] = entry
        for layer, entries in by_layer.items():
            yield file, layer, *_from_zero(file, entries, start)


def _from_zero(file: Path, entries: Header, start: int) -> tuple[Header, int]:
    first = end = next(iter(entries.values()))["data_offsets"][0]
    moved = {}
    for name, entry in entries.items():
        begin, after = entry["data_offsets"]
        if begin != end:
            raise ValueError(f"{file.name}: {name} does not follow what comes before it: run `airstream repack` first")
        moved[name], end = entry | {"data_offsets": [begin - first, after - first]}, after
    return moved, start + first


def link_run(source: Path, offset: int, entries: Header, out: Path) -> None:
    """Write `entries`, whose bytes are in `source` from `offset` on, to the file `out`, and link all whole blocks.

    Raises:
        OSError: the file system has no such links.
    """
    nbytes = max(entry["data_offsets"][1] for entry in entries.values())
    header = json.dumps(entries).encode()
    length = len(header) + (offset - 8 - len(header)) % BLOCK_BYTES  # so that blocks fall on blocks
    head = min(-offset % BLOCK_BYTES, nbytes)
    whole = (nbytes - head) // BLOCK_BYTES * BLOCK_BYTES
    if fcntl is None:
        raise OSError("links between parts of files are asked for as Linux has them")
    with source.open("rb") as given, out.open("xb") as made:
        made.write(length.to_bytes(8, "little") + header.ljust(length))
        made.write(os.pread(given.fileno(), head, offset))
        made.flush()
        if whole:
            asked = struct.pack("qQQQ", given.fileno(), offset + head, whole, made.tell())
            fcntl.ioctl(made.fileno(), CLONE_RANGE, asked)
            made.seek(0, os.SEEK_END)
        made.write(os.pread(given.fileno(), nbytes - head - whole, offset + head + whole))


def write_taller(small: Path, out: Path, layers: int) -> int:
    """Write the folder `out`; returns the bytes that its tensors seem to have.

    Raises:
        OSError: `out` is there, or the file system has no such links.
        ValueError: the tensors of a layer are not one run of bytes.
    """
    config = json.loads((small / "config.json").read_text())
    count = config["num_hidden_layers"]
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    for file, layer, entries, offset in runs(small):
        for number in [None] if layer is None else range(layer, layers, count):
            renamed = {LAYER.sub(str(number), name): entry for name, entry in entries.items()}
            name = f"model-{len(list(out.glob('*.safetensors'))):05d}.safetensors"
            link_run(file, offset, renamed, out / name)
            weight_map |= dict.fromkeys(renamed, name)
            total += max(entry["data_offsets"][1] for entry in renamed.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX_NAME).write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    for file in small.glob("tokenizer*"):
        shutil.copy(file, out)
    return total


def main() -> int:
    """Write it, and say how large it seems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("layers", type=int)
    arguments = parser.parse_args()
    try:
        total = write_taller(arguments.small, arguments.out, arguments.layers)
    except (OSError, ValueError) as error:
        print(f"taller: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {arguments.layers} layers, {total / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
