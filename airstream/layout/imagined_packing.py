"""This imagines a checkpoint packed without loss, from the headers of a plain one, so that it can be planned for.

What blocks need is known when they are packed: here it is what trained weights need, by the exponents of a normal
distribution. It opens nothing.
"""

from __future__ import annotations

from dataclasses import replace

from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.codecs.block_types import BlockType
from airstream.codecs.lossless_blocks import LOSSLESS, lossless_block
from airstream.codecs.lossless_pack import block_elements

__all__ = ["imagine_packed"]

TYPICAL_CODEC = "bf16x12"
TYPICAL_SLOTS = 1 / 512
"""For each number: of a normal distribution, 0.03 % are outside of a window of 15 exponents, and some blocks have more
of them than others."""


def imagine_packed(index: CheckpointIndex) -> CheckpointIndex:
    """The index of what `index` becomes when it is packed, as far as that is known before."""
    tensors, saved = {}, dict.fromkeys(index.files, 0)
    for tensor in sorted(index.values(), key=lambda tensor: (tensor.file, tensor.offset)):
        block = _block_of(tensor)
        nbytes = tensor.nbytes if block is None else tensor.nbytes // (2 * block.elements) * block.nbytes
        start = tensor.offset if tensor.resident_offset is None else tensor.resident_offset
        tensors[tensor.name] = replace(
            tensor,
            offset=tensor.offset - saved[tensor.file],
            nbytes=nbytes,
            block=block or tensor.block,
            resident_offset=start,
        )
        saved[tensor.file] += tensor.nbytes - nbytes
    return CheckpointIndex(tensors)


def _block_of(tensor: StoredTensor) -> BlockType | None:
    if tensor.dtype != "BF16" or tensor.block is not None or len(tensor.shape) < 2 or not tensor.nbytes:
        return None
    codec = LOSSLESS[TYPICAL_CODEC]
    elements = block_elements(tensor.shape[-1], codec)
    if elements is None:
        return None
    nbytes = codec.nbytes(elements, 4 * round(elements * TYPICAL_SLOTS / 4))
    return lossless_block(TYPICAL_CODEC, elements, nbytes) if nbytes < 2 * elements else None
