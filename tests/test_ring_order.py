"""The ring gives room without overlap, and the order of access is learnt after one period and never forgotten."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airstream.checkpoint.files import PAGE_BYTES
from airstream.order import AccessOrder
from airstream.ring import Ring, ring_bytes
from airstream.units import round_up

# ------------------------------------------------------------------------------------------------------------ the ring


@given(st.integers(0, 20), st.lists(st.integers(1, 6 * PAGE_BYTES), max_size=30), st.data())
def test_spans_are_aligned_inside_and_apart(num_pages: int, sizes: list[int], data: st.DataObject) -> None:
    nbytes = num_pages * PAGE_BYTES
    ring = Ring(nbytes)
    spans: dict[int, tuple[int, int]] = {}
    for batch, size in enumerate(sizes):
        start = ring.place(batch, size)
        if start is None:
            assert size > largest_gap(nbytes, list(spans.values())), "refused, though there was room"
        else:
            assert start % PAGE_BYTES == 0
            assert 0 <= start <= start + size <= nbytes
            assert all(start + size <= first or start >= end for first, end in spans.values())
            spans[batch] = (start, start + round_up(size, PAGE_BYTES))
        frees = data.draw(st.booleans())
        if spans and frees:
            gone = data.draw(st.sampled_from(sorted(spans)))
            ring.free(gone)
            del spans[gone]


def largest_gap(nbytes: int, spans: list[tuple[int, int]]) -> int:
    edges = [(0, 0), *sorted(spans), (nbytes, nbytes)]
    return max(start - end for (_, end), (start, _) in itertools.pairwise(edges))


@given(st.integers(1, 12), st.integers(1, PAGE_BYTES * 3))
def test_a_ring_holds_as_many_as_it_was_made_for(count: int, size: int) -> None:
    ring = Ring(ring_bytes([size] * count, count))
    assert None not in [ring.place(batch, size) for batch in range(count)]
    assert ring.place(count, 1) is None


def test_freed_room_is_used_again() -> None:
    ring = Ring(3 * PAGE_BYTES)
    places = [ring.place(batch, PAGE_BYTES) for batch in range(3)]
    assert sorted(place for place in places if place is not None) == [0, PAGE_BYTES, 2 * PAGE_BYTES]
    assert ring.place(3, 1) is None
    ring.free(1)
    assert ring.place(3, PAGE_BYTES) == places[1]


def test_freeing_what_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        Ring(PAGE_BYTES).free(0)


SIZES = st.lists(st.integers(1, 8).map(lambda pages: pages * PAGE_BYTES), min_size=1, max_size=8)


@given(SIZES, st.integers(1, 5))
def test_ring_bytes_is_what_the_largest_neighbours_need(sizes: list[int], depth: int) -> None:
    depth = min(depth, len(sizes))
    windows = [[sizes[(first + i) % len(sizes)] for i in range(depth)] for first in range(len(sizes))]
    assert ring_bytes(sizes, depth) >= max(sum(window) for window in windows)
    assert ring_bytes(sizes, depth) >= ring_bytes(sizes, depth - 1)


def test_ring_bytes_of_nothing() -> None:
    assert ring_bytes([], 3) == 0


def walk_the_cycle(sizes: list[int], depth: int) -> None:
    """Three passes, `depth` batches at a time: each next one must find room once the oldest is gone."""
    ring, present = Ring(ring_bytes(sizes, depth)), list[int]()
    depth = min(depth, len(sizes))
    for batch in itertools.islice(itertools.cycle(range(len(sizes))), 3 * len(sizes)):
        if len(present) == depth:
            ring.free(present.pop(0))
        assert ring.place(batch, sizes[batch]) is not None, f"no room for batch {batch} beside {present}"
        present.append(batch)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_equal_layers_cycle_through_the_ring(depth: int) -> None:
    walk_the_cycle([7 * PAGE_BYTES] * 9, depth)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("num_layers", [4, 5])
def test_layers_and_a_larger_lm_head_cycle_through_the_ring(num_layers: int, depth: int) -> None:
    walk_the_cycle([4 * PAGE_BYTES] * num_layers + [10 * PAGE_BYTES], depth)


@given(SIZES, st.integers(1, 4))
def test_the_ring_always_admits_the_cyclic_window(sizes: list[int], depth: int) -> None:
    walk_the_cycle(sizes, depth)


# ----------------------------------------------------------------------------------------------------------- the order


def surprises(order: AccessOrder, accesses: list[int]) -> int:
    return sum(not order.observe(batch) for batch in accesses)


def follows(order: AccessOrder, period: list[int], passes: int = 3) -> None:
    """`period` is predicted, each step and what comes after it."""
    for _, place in itertools.product(range(passes), range(len(period))):
        ahead = (period + period)[place:]
        assert order.upcoming(2) == list(dict.fromkeys(ahead))[:2]
        assert order.observe(period[place])


@given(st.integers(1, 20))
def test_the_listed_order_needs_no_learning(num_batches: int) -> None:
    follows(AccessOrder(range(num_batches)), list(range(num_batches)))


PERIODS = {
    "reversed": [4, 3, 2, 1, 0],
    "permuted": [2, 0, 4, 1, 3],
    "some skipped": [0, 2, 4],
    "one only": [3],
    "a loop": [0, 1, 0, 1, 2],
    "a loop at the end": [0, 1, 2, 1, 2],
    "a longer loop": [0, 1, 2, 1, 2, 1, 2, 3],
    "each twice": [0, 0, 1, 1, 2, 2],
    "there and back": [0, 1, 2, 3, 4, 3, 2, 1],
    "shared": [0, 4, 1, 4, 2, 4, 3, 4],
}


@pytest.mark.parametrize("period", PERIODS.values(), ids=PERIODS)
def test_loops_are_predicted_once_they_have_been_seen_from_end_to_end(period: list[int]) -> None:
    order = AccessOrder(range(5))
    surprises(order, period * 2)  # once to see it, once to see that it comes again
    order.observe(period[0])
    follows(order, period[1:] + period[:1])


@given(st.lists(st.integers(0, 5), max_size=8))
def test_every_period_with_a_landmark_is_predicted(period: list[int]) -> None:
    """A landmark is a batch that is asked for once a period: the first layer, say, or the lm_head."""
    landmark = 6
    order = AccessOrder(range(7))
    surprises(order, [*period, landmark] * 3)
    assert surprises(order, [*period, landmark] * 3) == 0


@given(st.permutations(range(7)))
def test_a_cyclic_order_surprises_for_one_period_only(period: list[int]) -> None:
    order = AccessOrder(range(7))
    surprises(order, period)
    order.observe(period[0])
    assert surprises(order, (period[1:] + period[:1]) * 3) == 0


ENCODER, DECODER = [0, 1, 2, 3], [4, 5, 6]


def test_an_encoder_that_runs_once_and_a_decoder_that_runs_often() -> None:
    order = AccessOrder(ENCODER + DECODER)
    assert surprises(order, ENCODER + DECODER) == 0
    assert surprises(order, DECODER * 50) <= 1  # that the encoder is not asked again
    for _ in range(3):
        assert surprises(order, ENCODER) <= 1  # that it is
        assert surprises(order, DECODER * 50) <= 1


@pytest.mark.parametrize("num_tokens", [1000, 10_000])
def test_an_encoder_is_not_forgotten_over_a_long_text(num_tokens: int) -> None:
    order = AccessOrder(ENCODER + DECODER)
    surprises(order, ENCODER + DECODER * num_tokens)
    assert surprises(order, ENCODER + DECODER) <= 2


def test_a_vision_tower_that_is_skipped_on_text() -> None:
    tower, layers = [0, 1], [2, 3, 4, 5]
    order = AccessOrder(tower + layers)
    assert surprises(order, layers * 100) <= 1 + 1
    assert surprises(order, tower + layers) <= 1
    assert surprises(order, layers * 100) <= 1


def history_size(order: AccessOrder) -> int:
    """Bytes of every list the order keeps."""
    return sum(sys.getsizeof(value) for value in vars(order).values() if isinstance(value, list))


@pytest.mark.parametrize("kind", ["cyclic", "random", "constant"])
def test_the_history_stays_bounded(kind: str) -> None:
    rng, order = random.Random(0), AccessOrder(range(40))
    kinds: dict[str, Callable[[int], int]] = {
        "cyclic": lambda i: i % 40,
        "random": lambda _: rng.randrange(40),
        "constant": lambda _: 7,
    }
    for i in range(10_000 if kind == "random" else 100_000):  # a surprise takes a hundred times as long
        order.observe(kinds[kind](i))
    assert history_size(order) < 100_000
    assert set(order.upcoming(40)) <= set(range(40))


@settings(max_examples=50)
@given(st.integers(1, 12), st.lists(st.integers(0, 11), max_size=60), st.integers(0, 15))
def test_what_comes_next_is_named_once(num_batches: int, accesses: list[int], count: int) -> None:
    order = AccessOrder(range(num_batches))
    for batch in accesses:
        order.observe(batch % num_batches)
        upcoming = order.upcoming(count)
        assert len(upcoming) == len(set(upcoming)) <= count
        assert set(upcoming) <= set(range(num_batches))


def test_as_many_as_are_asked_for_are_named() -> None:
    order = AccessOrder(range(5))
    for batch in (0, 1, 2, 3, 4, 0, 1):
        order.observe(batch)
    assert [order.upcoming(count) for count in range(4)] == [[], [2], [2, 3], [2, 3, 4]]
    assert order.upcoming(100)[:4] == [2, 3, 4, 0]
