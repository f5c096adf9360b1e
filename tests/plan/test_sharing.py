"""Groups share allocations: which ones is a matter of their order, and little is rounded up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airstream.plan.facts import Group
from airstream.plan.sharing import LARGE_BYTES, SHARED_BYTES, STEP_BYTES, in_steps, roundings, sharing
from airstream.reporting.units import KIB, MIB

SIZES = st.lists(st.integers(0, 100_000).map(lambda pages: pages * 4 * KIB), max_size=60)


def groups_of(sizes: list[int]) -> list[Group]:
    return [Group((str(number),), nbytes, None) for number, nbytes in enumerate(sizes)]


@given(SIZES)
def test_any_number_of_groups_takes_what_its_allocations_take(sizes: list[int]) -> None:
    groups = groups_of(sizes)
    taken = roundings(groups)
    whole = list(sharing(groups))
    for count in range(len(groups) + 1):
        together = list(sharing(groups[:count]))
        assert [group for each in together for group in each] == groups[:count]
        assert together[:-1] == whole[: max(len(together) - 1, 0)], "a plan for less memory changes the last one alone"
        allocated = sum(in_steps(sum(group.nbytes for group in each)) for each in together)
        assert taken[count] == allocated - sum(sizes[:count])
        assert 0 <= taken[count] <= STEP_BYTES * len(together)


@pytest.mark.parametrize("nbytes", [100 * KIB, 1 * MIB + 1, 7 * MIB, 40 * MIB + 1, SHARED_BYTES + 1])
def test_whatever_the_size_of_groups_little_is_lost(nbytes: int) -> None:
    sizes = [nbytes] * (8 * SHARED_BYTES // nbytes)
    assert roundings(groups_of(sizes))[-1] < 0.017 * sum(sizes)


def test_a_small_block_is_cut_from_one_that_is_there() -> None:
    assert in_steps(LARGE_BYTES - 1) == LARGE_BYTES - 1
    assert in_steps(LARGE_BYTES + 1) == LARGE_BYTES + STEP_BYTES
