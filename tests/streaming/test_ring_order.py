"""The ring gives room without overlap, and the order of access is learnt after one period and never forgotten."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from airstream.layout.ring import Ring, ring_bytes, room_sizes
from airstream.reporting.units import round_up
from airstream.streaming.order import AccessOrder
from airstream.transfer.files import PAGE_BYTES

# ------------------------------------------------------------------------------------------------------------ the ring


@given(st.integers(0, 20), st.lists(st.integers(1, 6 * PAGE_BYTES), max_size=30), st.data())
def test_spans_are_aligned_inside_and_apart(num_pages: int, sizes: list[int], data: st.DataObject) -> None:
    nbytes = num_pages * PAGE_BYTES
    ring = Ring(nbytes)
    spans: dict[int, tuple[int, int]] = {}
    for batch, size in enumerate(sizes):
        spare = data.draw(st.sets(st.sampled_from(sorted(spans)))) if spans else set[int]()
        kept = [span for other, span in spans.items() if other not in spare]
        placed = ring.place(batch, size, spare)
        if placed is None:
            assert size > largest_gap(nbytes, kept), "refused, though there was room"
        else:
            start, lost = placed
            end = start + round_up(size, PAGE_BYTES)
            assert start % PAGE_BYTES == 0
            assert 0 <= start < end <= nbytes
            assert sorted(lost) == [other for other, (first, last) in spans.items() if start < last and first < end]
            assert set(lost) <= spare, "a span in use was overwritten"
            spans = {other: span for other, span in spans.items() if other not in lost} | {batch: (start, end)}
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
    assert sorted(place for place in places if place is not None) == [
        (0, []),
        (PAGE_BYTES, []),
        (2 * PAGE_BYTES, []),
    ]
    assert ring.place(3, 1) is None
    ring.free(1)
    assert ring.place(3, PAGE_BYTES) == places[1]


def test_what_is_spare_makes_room_and_what_lost_its_place_is_given_back() -> None:
    ring = Ring(4 * PAGE_BYTES)
    for batch in range(4):
        ring.place(batch, PAGE_BYTES)
    assert ring.place(4, 2 * PAGE_BYTES) is None
    assert ring.place(4, 2 * PAGE_BYTES, spare=[0]) is None, "one place is not enough"
    placed = ring.place(4, 3 * PAGE_BYTES, spare=range(4))
    assert placed is not None
    assert len(placed[1]) == 3
    for lost in placed[1]:
        with pytest.raises(KeyError):
            ring.free(lost)
    (left,) = set(range(4)) - set(placed[1])
    ring.free(left)


def test_what_is_left_free_stays_in_one_piece() -> None:
    """A batch beside another goes to the far end of the ring."""
    ring = Ring(10 * PAGE_BYTES)
    assert ring.place(0, 3 * PAGE_BYTES) == (0, [])
    assert ring.place(1, 2 * PAGE_BYTES) == (8 * PAGE_BYTES, [])
    ring.free(0)
    assert ring.place(2, 8 * PAGE_BYTES) == (0, [])


def test_freeing_what_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        Ring(PAGE_BYTES).free(0)


SIZES = st.lists(st.integers(1, 8).map(lambda pages: pages * PAGE_BYTES), min_size=1, max_size=8)


def window_of(sizes: list[int], depth: int) -> int:
    """The largest sum of `depth` neighbours, the first after the last included."""
    depth = min(depth, len(sizes))
    return max(sum((sizes + sizes)[first : first + depth]) for first in range(len(sizes)))


@given(SIZES, st.integers(1, 5))
def test_ring_bytes_is_what_the_largest_neighbours_need_and_little_more(sizes: list[int], depth: int) -> None:
    assert window_of(sizes, depth) <= ring_bytes(sizes, depth) <= sum(room_sizes(sizes))


@given(SIZES, st.integers(1, 3))
def test_up_to_two_ahead_gaps_cost_no_more_than_one_batch(sizes: list[int], depth: int) -> None:
    assert ring_bytes(sizes, depth) <= window_of(sizes, depth) + max(sizes)


@given(st.integers(1, 33), st.integers(1, 100), st.integers(0, 150), st.integers(1, 5))
def test_layers_and_an_lm_head_need_at_most_one_batch_more(count: int, pages: int, more: int, depth: int) -> None:
    sizes = room_sizes([pages * PAGE_BYTES] * count + [(pages + more) * PAGE_BYTES])
    assert ring_bytes(sizes, depth) <= window_of(sizes, depth) + max(sizes)


@given(st.integers(1, 12), st.integers(1, 3 * PAGE_BYTES), st.integers(1, 5))
def test_equal_batches_need_no_more_than_their_sum(count: int, size: int, depth: int) -> None:
    assert ring_bytes([size] * count, depth) == min(depth, count) * round_up(size, PAGE_BYTES)


@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 20))
def test_one_ahead_a_larger_lm_head_costs_no_more_than_its_difference(count: int, pages: int, more: int) -> None:
    sizes = [pages * PAGE_BYTES] * count + [(pages + more) * PAGE_BYTES]
    assert ring_bytes(sizes, 2) == window_of(sizes, 2)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_layers_that_differ_by_a_page_do_not_cost_another_layer(depth: int) -> None:
    """As they do where tensors lie at other places within a page."""
    sizes = [(1000 + random.Random(number).randint(0, 1)) * PAGE_BYTES for number in range(32)]
    assert ring_bytes(sizes, depth) <= depth * max(sizes)


def test_ring_bytes_of_nothing() -> None:
    assert ring_bytes([], 3) == 0


NUM_PASSES = 20


def stuck_at(nbytes: int, sizes: list[int], depth: int) -> str:
    """Where a walk like the streamer's finds no room: one batch in use, `depth - 1` read ahead, the rest spare."""
    ring, present, count = Ring(nbytes), set[int](), len(sizes)
    for step in range(NUM_PASSES * count):
        ahead = [(step + distance) % count for distance in range(min(depth, count))]
        for batch in ahead:
            if batch not in present:
                spare = present.difference(ahead) if nbytes < sum(sizes) else ()
                placed = ring.place(batch, sizes[batch], spare)
                if placed is None:
                    return f"no room for batch {batch} beside {sorted(present.intersection(ahead))} in step {step}"
                present = present.difference(placed[1]) | {batch}
    return ""


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_equal_layers_cycle_through_the_ring(depth: int) -> None:
    sizes = [7 * PAGE_BYTES] * 9
    assert stuck_at(ring_bytes(sizes, depth), sizes, depth) == ""


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@pytest.mark.parametrize("num_layers", [4, 5, 6, 7, 8])
def test_layers_and_a_larger_lm_head_cycle_through_the_ring(num_layers: int, depth: int) -> None:
    sizes = [4 * PAGE_BYTES] * num_layers + [10 * PAGE_BYTES]
    assert stuck_at(ring_bytes(sizes, depth), sizes, depth) == ""
    sizes[-1] = 5 * PAGE_BYTES
    assert stuck_at(ring_bytes(sizes, depth), sizes, depth) == ""


@settings(max_examples=300)
@given(SIZES, st.integers(1, 5))
@example([pages * PAGE_BYTES for pages in (2, 1, 2, 2, 2, 3)], 3)
def test_the_ring_always_admits_the_cyclic_window(sizes: list[int], depth: int) -> None:
    assert stuck_at(ring_bytes(sizes, depth), sizes, depth) == ""


@settings(max_examples=200)
@given(SIZES, st.integers(1, 4))
def test_the_ring_is_larger_than_the_window_only_if_the_window_would_not_do(sizes: list[int], depth: int) -> None:
    window = window_of(sizes, depth)
    assert ring_bytes(sizes, depth) == window or stuck_at(window, sizes, depth)


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
def test_a_cyclic_order_surprises_for_two_periods_only(period: list[int]) -> None:
    order = AccessOrder(range(7))
    surprises(order, period * 2)
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


@pytest.mark.parametrize("listed", [2, 7, 40])
@pytest.mark.parametrize("kind", ["one only", "random", "a period longer than what is kept"])
def test_the_listed_order_is_never_forgotten(kind: str, listed: int) -> None:
    """What has not been asked for in ten thousand steps, or never, is found, and followed by what is listed next."""
    rng, order = random.Random(1), AccessOrder(range(listed + 4))
    period = [rng.randrange(listed) for _ in range(3000)]
    if kind == "one only":
        accesses = [0] * 10_000
    elif kind == "random":
        accesses = [rng.randrange(listed) for _ in range(10_000)]
    else:
        accesses = period * 4
    for batch in accesses:
        order.observe(batch)
        assert order.upcoming(1)[0] in range(listed + 4)
    order.observe(listed)  # for the first time
    assert order.upcoming(3) == [listed + 1, listed + 2, listed + 3]
    assert surprises(order, [listed + 1, listed + 2, listed + 3]) == 0


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
