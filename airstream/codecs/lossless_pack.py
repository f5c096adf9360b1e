"""This makes blocks of bfloat16 that give every bit back, and finds out which blocks suit a tensor, by counting.

It works on a CPU, with numpy where there is no kernel, to the same bytes. It knows numbers. It refuses to know files,
and where the numbers of a tensor come from, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch

from airstream.codecs.block_types import BlockType
from airstream.codecs.lossless_blocks import (
    HEAD_BYTES,
    LOSSLESS,
    MAX_ELEMENTS,
    SLOTS_MULTIPLE,
    Lossless,
    lossless_block,
    max_slots,
)
from airstream.codecs.lossless_native import Kernel, checksums, count_outside, encoder
from airstream.errors import CheckpointError
from airstream.reporting.units import counted

LEAST_GAIN = 0.01
"""Of the bytes: below it numbers stay plain, which everybody can read."""

LEAST_KEPT = 256
"""Numbers of a block from which on where its window begins is kept: that is little memory beside the numbers."""

STEP_ELEMENTS = 1 << 17
"""Numbers that numpy works on at a time, unless a block has more."""


class Survey:
    """Counts what blocks of a tensor would need, while it goes by in runs of whole rows."""

    def __init__(self, row_length: int, names: Iterable[str] = tuple(LOSSLESS)) -> None:
        self._sizes = {name: size for name in names if (size := block_elements(row_length, LOSSLESS[name]))}
        self._outside = dict.fromkeys(self._sizes, 0)
        self._bases: dict[str, torch.Tensor | None] = {}

    def add(self, numbers: torch.Tensor) -> None:
        """Count `numbers`, bfloat16 or int16, contiguous, whole rows."""
        for elements in dict.fromkeys(self._sizes.values()):
            names = [name for name in self._sizes if self._sizes[name] == elements]
            most, bases = _count_outside(_rows(numbers, elements), [LOSSLESS[name].window for name in names])
            for place, name in enumerate(names):
                self._outside[name] = max(self._outside[name], most[place])
                self._bases[name] = bases[place] if bases is not None and elements >= LEAST_KEPT else None

    def join(self, other: Survey) -> None:
        """Count what `other` has counted, of rows as long."""
        self._outside = {name: max(most, other._outside[name]) for name, most in self._outside.items()}

    def bases(self, block: BlockType) -> torch.Tensor | None:
        """What `encode` need not count again of the numbers that were added last, if that was kept."""
        return self._bases.get(block.name)

    def block(self) -> BlockType | None:
        """The smallest block that fits all numbers that were added; None if plain numbers are as small."""
        best, least = None, 2 * (1 - LEAST_GAIN)
        for name, elements in self._sizes.items():
            slots = -(-self._outside[name] // SLOTS_MULTIPLE) * SLOTS_MULTIPLE
            nbytes = LOSSLESS[name].nbytes(elements, slots)
            if slots <= max_slots(elements) and nbytes / elements <= least:
                best, least = lossless_block(name, elements, nbytes), nbytes / elements
        return best


def choose_block(numbers: torch.Tensor, row_length: int, names: Iterable[str] = tuple(LOSSLESS)) -> BlockType | None:
    """The block that makes `numbers` smallest, of the codecs `names`, or None: see `Survey`, which takes parts."""
    survey = Survey(row_length, names)
    survey.add(numbers)
    return survey.block()


def block_elements(row_length: int, codec: Lossless) -> int | None:
    """The numbers of the largest block of `codec` that no row cuts; None if there is none."""
    largest = min(row_length, MAX_ELEMENTS) // codec.multiple * codec.multiple
    fitting = (n for n in range(largest, 0, -codec.multiple) if row_length % n == 0)
    return next(fitting, None)


def encode(numbers: torch.Tensor, block: BlockType, bases: torch.Tensor | None = None) -> torch.Tensor:
    """`numbers`, bfloat16 or int16, contiguous, on a CPU, as blocks: uint8, flat.

    Args:
        bases: of the same numbers, as a `Survey` counted them; other ones make larger blocks, or none.

    Raises:
        CheckpointError: more exponents are outside of a block's window than it has slots.
        ValueError: the numbers are not those of whole blocks.
    """
    if bases is not None and len(bases) * block.elements != numbers.numel():
        raise ValueError(f"{counted(len(bases), 'window')} cannot be those of {counted(numbers.numel(), 'value')}")
    kernel = encoder(block.name, block.elements, LOSSLESS[block.name].slots(block), bases)
    return _encode(numbers, block, kernel or partial(_encode_with_numpy, block=block))


def encode_with_numpy(numbers: torch.Tensor, block: BlockType) -> torch.Tensor:
    """As `encode`, without a compiler."""
    return _encode(numbers, block, partial(_encode_with_numpy, block=block))


def _encode(numbers: torch.Tensor, block: BlockType, put: Kernel) -> torch.Tensor:
    rows = _rows(numbers, block.elements)
    blocks = torch.empty((len(rows), block.nbytes), dtype=torch.uint8, device="cpu")
    done = put(blocks, rows)
    if done < len(rows):
        raise CheckpointError(_no_room(block, done))
    blocks[:, HEAD_BYTES - 4 : HEAD_BYTES] = checksums(rows).view(torch.uint8).view(-1, 4)
    return blocks.view(-1)


def _rows(numbers: torch.Tensor, elements: int) -> torch.Tensor:
    if numbers.numel() % elements:
        raise ValueError(f"{counted(numbers.numel(), 'value')} cannot be blocks of {elements:,}")
    return numbers.view(torch.int16).view(-1, elements)


def _no_room(block: BlockType, number: int) -> str:
    slots = LOSSLESS[block.name].slots(block)
    return f"block {number:,} of {block.name} has more than {slots:,} exponents outside of its window: count them anew"


def _encode_with_numpy(blocks: torch.Tensor, rows: torch.Tensor, block: BlockType) -> int:
    """Write all but the checksums of `rows` to `blocks`; how many come before one that has too many exponents."""
    step = max(1, STEP_ELEMENTS // block.elements)
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        full = _put(blocks[some].numpy(), rows[some].numpy().view(np.uint16), block)
        if full is not None:
            return start + full
    return len(rows)


def _put(blocks: np.ndarray, rows: np.ndarray, block: BlockType) -> int | None:
    codec, n = LOSSLESS[block.name], block.elements
    exponents = (rows >> 7).astype(np.uint8)
    bases, _ = _windows(exponents, codec.window)
    codes = exponents - bases[:, None]  # modulo 256, so that one comparison has both ends
    inside = codes < codec.window
    outside = ~inside & (exponents != 0)
    codes = np.where(inside, codes + np.uint8(1), np.uint8(0))
    slots = codec.slots(block)
    full = np.flatnonzero(outside.sum(1) > slots)
    if full.size:
        return int(full[0])
    blocks[:, :HEAD_BYTES] = 0
    blocks[:, 0] = bases
    blocks[:, HEAD_BYTES : HEAD_BYTES + n] = rows >> 8 & 0x80 | rows & 0x7F
    codes_at, slots_at = HEAD_BYTES + n, HEAD_BYTES + n + n * codec.code_bits // 8
    positions, others = _slots(exponents, outside, slots)
    if block.name == "bf16x12":
        halves = codes.reshape(len(rows), -1, 2, 16)
        blocks[:, codes_at:slots_at] = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(rows), -1)
        used = np.arange(slots) < outside.sum(1)[:, None]
        blocks[:, slots_at : slots_at + 2 * slots] = positions.astype("<u2").view(np.uint8)
        blocks[:, slots_at + 2 * slots :] = np.where(used, others, exponents[:, :1])
    else:
        codes[outside] = 7
        planes = [np.packbits(codes >> place & 1, axis=1, bitorder="little") for place in range(3)]
        blocks[:, codes_at:slots_at] = np.concatenate(planes, axis=1)
        blocks[:, slots_at:] = others
    return None


def _slots(exponents: np.ndarray, outside: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Where exponents are that no code stands for, and which; zeros in the slots that are left. (rows, slots)."""
    positions = np.zeros((len(exponents), slots), dtype=np.uint16)
    others = np.zeros((len(exponents), slots), dtype=np.uint8)
    row, place = np.nonzero(outside)
    first = np.searchsorted(row, row)  # where the row's own begin
    positions[row, np.arange(len(row)) - first] = place
    others[row, np.arange(len(row)) - first] = exponents[row, place]
    return positions, others


def _windows(exponents: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The first exponent of the window that holds most of each row, the lowest such, and how many are outside."""
    rows, n = exponents.shape
    keys = exponents + 256 * np.arange(rows, dtype=np.int64)[:, None]
    counts = np.bincount(keys.reshape(-1), minlength=256 * rows).reshape(rows, 256)
    counts[:, 0] = n - counts[:, 0]  # those that need a place, before the counts of all others
    below = np.cumsum(counts, axis=1) - counts[:, :1]  # exponents from 1 up to each
    held = below[:, width:] - below[:, : 256 - width]
    bases = held.argmax(axis=1)
    return (bases + 1).astype(np.uint8), counts[:, 0] - held[np.arange(rows), bases]


def _count_outside(rows: torch.Tensor, widths: Sequence[int]) -> tuple[list[int], torch.Tensor | None]:
    """For each of `widths` the most that a row has outside of its window; where windows begin, if that was kept."""
    kernel = count_outside()
    if kernel is not None:
        return kernel(rows, widths)
    step, most = max(1, STEP_ELEMENTS // rows.shape[1]), [0] * len(widths)
    for start in range(0, len(rows), step):
        exponents = (rows[start : start + step].numpy().view(np.uint16) >> 7).astype(np.uint8)
        each = [_windows(exponents, width)[1].max(initial=0) for width in widths]
        most = [max(known, int(found)) for known, found in zip(most, each, strict=True)]
    return most, None
