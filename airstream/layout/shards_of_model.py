"""This says what a model says of its tensors, in the terms of `shards`: their names, their order, their layers.

It knows models and keys of checkpoints. It refuses to know files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from airstream.checkpoint.stored import CheckpointIndex
from airstream.compat.mapped_conversion import MappedConversion
from airstream.compat.weights import natural_order, tied_names
from airstream.layout.parts import find_units
from airstream.layout.shards import Member, Order

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def order_of(model: PreTrainedModel) -> Order:
    """The order in which tensors of `model` are to lie."""
    return Order(list(model.state_dict()), find_units(model), tied_names(model))


def members_of(model: PreTrainedModel, index: CheckpointIndex, order: Order) -> list[Member]:
    """The tensors of the checkpoint `index`, with what they are in `model`, whose `order` that is."""
    conversion, names = MappedConversion(model), set(order.names)
    renamed = ((key, conversion.rename(key)[0]) for key in natural_order(index))
    return [Member(index[key], name if name in names else None) for key, name in renamed]
