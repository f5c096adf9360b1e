"""This says what a block is, and has the table of the types of fixed size: how many numbers, in how many bytes.

Blocks of lossless bfloat16 have the size that suits a tensor: see `lossless_blocks`. That is all that whoever reads
headers has to know of packed weights. It refuses to know how a block is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    """Numbers that are stored together.

    Attributes:
        elements: numbers in a block.
        nbytes: bytes of a block.
        dtype: what its numbers are computed in, by its name in torch; they are rounded to any other one.
    """

    name: str
    elements: int
    nbytes: int
    dtype: str = "float32"


BLOCK_TYPES: Mapping[str, BlockType] = {
    block.name: block
    for block in (
        BlockType("Q4_0", 32, 18),
        BlockType("Q4_1", 32, 20),
        BlockType("Q5_0", 32, 22),
        BlockType("Q5_1", 32, 24),
        BlockType("Q8_0", 32, 34),
        BlockType("Q2_K", 256, 84),
        BlockType("Q3_K", 256, 110),
        BlockType("Q4_K", 256, 144),
        BlockType("Q5_K", 256, 176),
        BlockType("Q6_K", 256, 210),
        BlockType("IQ4_NL", 32, 18),
        BlockType("IQ4_XS", 256, 136),
        BlockType("MXFP4", 32, 17),
        BlockType("IQ1_S", 256, 50),
        BlockType("IQ1_M", 256, 56),
        BlockType("IQ2_XXS", 256, 66),
        BlockType("IQ2_XS", 256, 74),
        BlockType("IQ2_S", 256, 82),
        BlockType("IQ3_XXS", 256, 98),
        BlockType("IQ3_S", 256, 110),
        BlockType("TQ1_0", 256, 54),
        BlockType("TQ2_0", 256, 66),
    )
}
"""Every type of fixed size by its name: the one that GGUF uses, if GGUF has the type."""

GRID_TYPES = ("IQ1_", "IQ2_", "IQ3_")
"""What the names of types begin with that look numbers up in tables."""

HOST_ONLY = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"})
"""Types that the CPU decodes, wherever the blocks lie: there is no way to do it in torch operations."""
