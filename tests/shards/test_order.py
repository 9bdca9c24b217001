import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import Order, permutation, splitmix64


def sizes(full: int, short: int) -> np.ndarray:
    return np.array([16] * full + [short] * (short > 0))


shapes = st.tuples(
    st.integers(1, 40), st.integers(0, 15), st.integers(1, 8), st.integers(1, 4), st.integers(0, 9)
)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_each_epoch_visits_every_sequence_once(shape):
    full, short, lanes, window, seed = shape
    order = Order(sizes(full, short), seed, lanes, window, chunk=4)
    for epoch in (0, 1, 5):
        block, row = order.rows(epoch * order.sequences + np.arange(order.sequences))
        assert (row < order.block_rows[block]).all()
        assert len(np.unique(block * 16 + row)) == order.sequences == 16 * full + short


@settings(max_examples=60, deadline=None)
@given(shapes, st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_a_position_means_the_same_however_it_is_asked_for(shape, positions):
    full, short, lanes, window, seed = shape
    together = Order(sizes(full, short), seed, lanes, window, chunk=4).rows(np.array(positions))
    alone = Order(sizes(full, short), seed, lanes, window, chunk=4)
    for i, position in enumerate(positions):
        block, row = alone.rows(np.array([position]))
        assert (block[0], row[0]) == (together[0][i], together[1][i])


def test_epochs_and_seeds_differ():
    order = Order(sizes(30, 5), 0, lanes=4)
    epochs = [order.rows(e * order.sequences + np.arange(order.sequences)) for e in range(2)]
    other = Order(sizes(30, 5), 1, lanes=4).rows(np.arange(order.sequences))
    numbers = [block * 16 + row for block, row in [*epochs, other]]
    for a, b in [(0, 1), (0, 2)]:
        assert (numbers[a] == numbers[b]).mean() < 0.05


def test_fewer_blocks_than_lanes_are_shuffled_as_a_whole():
    order = Order(np.full(30, 256), 0)
    block, _ = order.rows(np.arange(128))
    assert len(np.unique(block)) > 25  # of 30: a batch draws from all of them


def test_order_does_not_change_between_versions():
    # A saved position is worth something only while these numbers stay: else raise ORDER_VERSION.
    assert permutation(8, 1, 2, 3).tolist() == [0, 7, 5, 3, 6, 2, 1, 4]
    block, row = Order(np.array([16] * 9 + [3]), 7, lanes=4, window=2, chunk=4).rows(
        np.array([0, 40, 146, 147, 400])
    )
    assert block.tolist() == [7, 0, 4, 0, 1]
    assert row.tolist() == [9, 14, 14, 2, 10]


def test_splitmix64_is_the_published_one():
    first_of_seed = splitmix64(np.array([1234567], np.uint64))
    assert first_of_seed.tolist() == [6457827717110365317]


def test_two_short_blocks_are_refused():
    with pytest.raises(ValueError, match="at most one"):
        Order(np.array([16, 3, 3]), 0)
