"""These are the sizes that the planner has to know of a model, and in which order its tensors may become resident.

There are numbers and names here, and no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from airstream.footprint.formulas import Footprint


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one batch that become resident together.

    Attributes:
        names: the names of the tensors.
        nbytes: the bytes that they take in the memory of the device that computes.
        host_bytes: the bytes that they take in host memory, from where they are copied to an accelerator; None if they
            cannot wait there.
        packed_bytes: the bytes that they take in the memory of the device that computes if they stay packed there, and
            are made dense in every pass; None for as many as `nbytes`.
        made_bytes: the room that passes then make them in.
    """

    names: tuple[str, ...]
    nbytes: int
    host_bytes: int | None
    packed_bytes: int | None = None
    made_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        """The bytes that they take where it computes if they stay packed."""
        return self.nbytes if self.packed_bytes is None else self.packed_bytes


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """Layers that move together, and what is left to move once some of their tensors have become resident.

    Attributes:
        units: the names of their modules, in order.
        groups: in the order in which they become resident, chosen so that what is left lies together in the file.
        slab_bytes: the bytes of the slab with the rest, by the number of groups that are resident: `len(groups) + 1`
            numbers.
        read_bytes: the bytes that are read from disk to fill this slab, by the same number.
    """

    units: tuple[str, ...]
    groups: tuple[Group, ...]
    slab_bytes: tuple[int, ...]
    read_bytes: tuple[int, ...]
    _sums: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _host_sums: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _packed_sums: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _made_sums: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Add up groups once: a plan is found by asking thousands of times."""
        sizes = [(group.nbytes, group.host_bytes or 0, group.kept_bytes, group.made_bytes) for group in self.groups]
        for number, name in enumerate(("_sums", "_host_sums", "_packed_sums", "_made_sums")):
            object.__setattr__(self, name, tuple(accumulate((size[number] for size in sizes), initial=0)))

    def resident_bytes(self, count: int) -> int:
        """The bytes of the first `count` groups on the device that computes."""
        return self._sums[count]

    def packed_bytes(self, start: int, stop: int) -> int:
        """The bytes of groups `start` to `stop` on the device that computes, if they stay packed."""
        return self._packed_sums[stop] - self._packed_sums[start]

    def made_bytes(self, start: int, stop: int) -> int:
        """The room that passes make groups `start` to `stop` in, if they stay packed."""
        return self._made_sums[stop] - self._made_sums[start]

    def host_bytes(self, start: int, stop: int) -> int:
        """Host memory of groups `start` to `stop`."""
        return self._host_sums[stop] - self._host_sums[start]

    def names(self, start: int, stop: int) -> tuple[str, ...]:
        """The tensors of groups `start` to `stop`."""
        return tuple(name for group in self.groups[start:stop] for name in group.names)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a token multiplies with, for predictions of time.

    Attributes:
        weight_bytes: the bytes of all layers and the lm_head; `head_bytes` of them are the lm_head's.
        expert_bytes: those of them that are routed experts; one token is routed to `expert_share` of those.
        attention_width: the width of a token's queries in one layer, in elements.
        num_weights: the numbers that all these bytes are.
        product_seconds: what one CPU core takes to multiply all of them with one vector, where they stay packed.
    """

    num_layers: int
    weight_bytes: int
    head_bytes: int
    expert_bytes: int
    expert_share: float
    attention_width: int
    num_weights: int
    product_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What adapters cost beside a model's own weights.

    Attributes:
        nbytes: the bytes of their weights, and of what they compute with them alone.
        token_bytes: the bytes of activations in the layers, per token.
        logit_bytes: the bytes of activations at the lm_head, per position.
    """

    nbytes: int = 0
    token_bytes: int = 0
    logit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's sizes.

    Attributes:
        batchings: for every number of layers per batch that may be chosen, best first, the batches it gives.
        head: the lm_head as a batch of its own if it can be streamed, else None.
        has_fixed_head: there is an lm_head that cannot, and is among the weights that always stay.
        resident_bytes: weights and buffers that always stay in memory.
        tables: the embedding tables, by parameter name. Only the rows needed are read, unless there is room for all.
        tables_of_head: those among them that are in memory anyway once the head is, because they are tied to it.
        checkpoint_bytes: all weights.
        conversion_bytes: what a converter of transformers needs for its results before they are in place.
        stored_bytes: the bytes on disk of all layers and the lm_head, if they are packed there.
        decoding_seconds_per_byte: what one CPU core takes to decode a byte from disk, if weights are packed there.
        decoding_traffic_per_byte: the bytes of its memory that an accelerator passes over to decode one.
        adapter_bytes: the bytes of adapters that have been loaded beside the model.
        position_limit: tokens that no sequence can exceed; None if positions are computed.
        rotary_limit: tokens that such positions were trained for, beyond which answers get worse; None if unknown.
        num_tensors: the number of tensors of the checkpoint, as its headers count them.
        kernels: what products are made by: see `Plan`.
    """

    name: str
    dtype: str
    batchings: Mapping[int, tuple[BatchFacts, ...]]
    head: BatchFacts | None
    resident_bytes: int
    tables: Mapping[str, Group]
    tables_of_head: frozenset[str]
    checkpoint_bytes: int
    conversion_bytes: int
    has_tokenizer: bool
    footprint: Footprint
    arithmetic: Arithmetic
    stored_bytes: int | None = None
    decoding_seconds_per_byte: float = 0.0
    decoding_traffic_per_byte: float = 0.0
    adapter_bytes: int = 0
    position_limit: int | None = None
    rotary_limit: int | None = None
    num_tensors: int = 0
    has_fixed_head: bool = False
    kernels: str = "exact"

    @property
    def may_stay_packed(self) -> bool:
        """Whether some tensors take less memory if they stay packed, and are made dense in every pass."""
        batches = next(iter(self.batchings.values()))
        return any(group.kept_bytes < group.nbytes for batch in batches for group in batch.groups)

    def with_adapters(self, adapters: AdapterFacts) -> ModelFacts:
        """The sizes of the model with these adapters instead of those that it has."""
        footprint = replace(
            self.footprint, adapter_token_bytes=adapters.token_bytes, adapter_logit_bytes=adapters.logit_bytes
        )
        return replace(self, adapter_bytes=adapters.nbytes, footprint=footprint)
