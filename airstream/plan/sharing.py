"""Groups that stay on a device share its memory: several of them are one allocation.

Allocators give large blocks in steps, which small groups would be rounded up to one by one. Which groups share is a
matter of their order alone: it is the same in every plan, but for the last ones, whichever plan was there before.

It knows the sizes of groups and of steps. It refuses to know devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from airstream.plan.facts import Group
from airstream.reporting.units import MIB, round_up

__all__ = ["in_steps", "roundings", "sharing"]

STEP_BYTES = 2 * MIB
"""torch's allocators give large blocks of device memory in multiples of this."""

LARGE_BYTES = 10 * MIB
"""From here on a block has memory of its own. Smaller ones are cut from blocks of 20 MiB; there are at most two of them
here, the last ones of the layers and of the lm_head, which the plan's line *runtime* has room for."""

SHARED_BYTES = 128 * MIB
"""Groups share an allocation until it is so large: a step is 1.6 % of it. So much is read again if a plan changes."""


def in_steps(nbytes: int) -> int:
    """What an allocation of `nbytes` takes."""
    return round_up(nbytes, STEP_BYTES) if nbytes >= LARGE_BYTES else nbytes


def sharing(groups: Iterable[Group]) -> Iterator[tuple[Group, ...]]:
    """The groups of each allocation, of those that stay, in the order in which they become resident."""
    together: list[Group] = []
    nbytes = 0
    for group in groups:
        together.append(group)
        nbytes += group.nbytes
        if nbytes >= SHARED_BYTES:
            yield tuple(together)
            together, nbytes = [], 0
    if together:
        yield tuple(together)


def roundings(groups: Iterable[Group]) -> list[int]:
    """The bytes that allocations take besides those of groups, by the number of groups that stay, in order."""
    closed, nbytes = 0, 0
    taken = [0]
    for group in groups:
        nbytes += group.nbytes
        taken.append(closed + in_steps(nbytes) - nbytes)
        if nbytes >= SHARED_BYTES:
            closed, nbytes = taken[-1], 0
    return taken
