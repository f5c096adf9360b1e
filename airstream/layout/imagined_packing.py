"""This imagines a checkpoint packed or quantised, from the headers of a plain one, so that it can be planned for.

Its files are those that a repack would write. What lossless blocks need is known when they are packed: here it is what
trained weights need, by the exponents of a normal distribution. It opens nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from airstream.checkpoint.packed_tensors import header_room, line_of
from airstream.checkpoint.stored import CheckpointIndex, StoredTensor
from airstream.codecs.block_types import BlockType
from airstream.codecs.lossless_blocks import LOSSLESS, lossless_block
from airstream.codecs.lossless_pack import block_elements
from airstream.layout.imagined import IMAGINED_FOLDER
from airstream.layout.imagined_checkpoint import Imagined
from airstream.layout.packable import may_pack
from airstream.layout.quantised import QuantisedTensors
from airstream.layout.shards import SHARD_SIZE, Shard, header_of, plan_shards
from airstream.layout.shards_of_model import members_of, order_of
from airstream.reporting.units import parse_shard_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["imagine_packed", "imagine_quantised"]

TYPICAL_CODEC = "bf16x12"
TYPICAL_SLOTS = 1 / 512
"""For each number: of a normal distribution, 0.03 % are outside of a window of 15 exponents, and some blocks have more
of them than others."""


def imagine_packed(model: PreTrainedModel, index: CheckpointIndex) -> Imagined | None:
    """What the checkpoint `index` of `model` becomes when it is packed without loss; None if nothing of it can be."""
    if not any(map(may_pack, index.values())):
        return None
    shards = _shards(model, index, None)
    return Imagined(_placed((shard, header_room(shard.tensors), _packed) for shard in shards), index.files)


def imagine_quantised(model: PreTrainedModel, index: CheckpointIndex, made: QuantisedTensors) -> Imagined:
    """What the checkpoint `index` of `model` becomes when its weights become what is `made` of them."""
    shards = [replace(shard, metadata=made.metadata) for shard in _shards(model, index, made)]
    index = _placed((shard, len(header_of(shard)), lambda tensor: tensor) for shard in shards)
    return Imagined(index, made.metadata, made.dtype, made.settings)


def _shards(model: PreTrainedModel, index: CheckpointIndex, made: QuantisedTensors | None) -> list[Shard]:
    order, shard_bytes = order_of(model), parse_shard_size(SHARD_SIZE)
    members = members_of(model, index, order)
    if made is None:
        return plan_shards(members, order, None, shard_bytes, on_pages=False)
    return plan_shards(members, order, None, shard_bytes, made.made_of)


def _placed(files: Iterable[tuple[Shard, int, Callable[[StoredTensor], StoredTensor]]]) -> CheckpointIndex:
    """The tensors of files, each of which begins with some bytes, and what becomes of a tensor in it."""
    placed: dict[str, StoredTensor] = {}
    for shard, start, change in files:
        end = start
        for tensor in map(change, shard.tensors):
            placed[tensor.name] = replace(tensor, file=IMAGINED_FOLDER / shard.file, offset=end)
            end += tensor.nbytes
    return CheckpointIndex(placed)


def _packed(tensor: StoredTensor) -> StoredTensor:
    """`tensor` as it is packed, wherever that will be."""
    block = _block_of(tensor)
    nbytes = tensor.nbytes if block is None else tensor.nbytes // (2 * block.elements) * block.nbytes
    return replace(tensor, nbytes=nbytes, block=block or tensor.block, resident_offset=line_of(tensor))


def _block_of(tensor: StoredTensor) -> BlockType | None:
    codec = LOSSLESS[TYPICAL_CODEC]
    elements = block_elements(tensor.shape[-1], codec) if may_pack(tensor) else None
    if elements is None:
        return None
    nbytes = codec.nbytes(elements, 4 * round(elements * TYPICAL_SLOTS / 4))
    return lossless_block(TYPICAL_CODEC, elements, nbytes) if nbytes < 2 * elements else None
