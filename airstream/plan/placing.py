"""This says which groups of tensors stay where, for every number of them that may stay.

It knows the groups of layers, and the order in which they become resident. It refuses to know budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from airstream.plan.facts import BatchFacts, Group
from airstream.plan.sharing import roundings
from airstream.plan.spread import counts_after, in_order, resident_order

__all__ = ["Placing", "Placings", "as_packed"]


@dataclass(frozen=True, slots=True)
class Placing:
    """How many groups of each batch stay on the device, the next ones packed, and the next ones in host memory.

    Those on the device take `rounding_bytes` besides.
    """

    resident: Sequence[int]
    packed: Sequence[int]
    hosted: Sequence[int]
    with_tables: bool = False
    rounding_bytes: int = 0


def as_packed(group: Group) -> Group:
    """What `group` is where it stays packed."""
    return replace(group, nbytes=group.kept_bytes)


class Placings:
    """The placings of a model's batches: those of `layers`, and that of the `head`, which stays or does not.

    Attributes:
        order: the batch that gives its next group, at every step.
    """

    def __init__(
        self, layers: Sequence[BatchFacts], head: BatchFacts | None, *, is_head_resident: bool, is_on_device: bool
    ) -> None:
        self.order = resident_order(layers)
        self._layers = layers
        self._head = head
        self._head_counts = [] if head is None else [len(head.groups) if is_head_resident else 0]
        self._groups = in_order(layers, self.order)
        self._is_on_device = is_on_device
        self._head_rounding = roundings(head.groups)[-1] if head and is_head_resident and is_on_device else 0

    @property
    def has_packed(self) -> bool:
        """Whether some groups take less memory if they stay packed."""
        return any(group.kept_bytes < group.nbytes for group in self._groups)

    def dense(self, steps: int) -> Placing:
        """The first groups stay, and if there are more steps than groups, embedding tables do."""
        return self._placing(steps, steps)

    def packed(self, dense: int, steps: int) -> Placing:
        """As `dense`, but that the first `dense` groups alone are, and the others packed."""
        return self._placing(dense, max(dense, steps))

    def hosted(self, chosen: Placing, steps: int) -> Placing:
        """`chosen`, and the next groups wait in host memory, the lm_head's first."""
        kept = sum(chosen.resident[: len(self._layers)]) + sum(chosen.packed)
        rest = [batch for batch in self.order[kept:] if _can_be_hosted(self._layers[batch])]
        if self._head is not None and not self._head_counts[0] and _can_be_hosted(self._head):
            rest.insert(0, len(self._layers))
        return replace(chosen, hosted=counts_after(rest, steps, len(chosen.resident)))

    def _placing(self, dense: int, steps: int) -> Placing:
        num_layers = len(self._layers)
        resident, kept = (counts_after(self.order, count, num_layers) for count in (dense, steps))
        packed = [all_of - some for all_of, some in zip(kept, resident, strict=True)]
        nothing = [0] * len(self._head_counts)
        return Placing(
            resident + self._head_counts,
            packed + nothing,
            [0] * (num_layers + len(nothing)),
            with_tables=steps > len(self.order),
            rounding_bytes=self._rounding(dense, steps),
        )

    def _rounding(self, dense: int, steps: int) -> int:
        if not self._is_on_device:
            return 0
        packed = (as_packed(group) for group in self._groups[dense:steps])
        return self._head_rounding + roundings([*self._groups[:dense], *packed])[-1]


def _can_be_hosted(batch: BatchFacts) -> bool:
    return all(group.host_bytes is not None for group in batch.groups)
