import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.read.order import Order, permutation, splitmix64
from shards.read.orders import DealtOrder


def sizes(full: int, short: int) -> np.ndarray:
    return np.array([16] * full + [short] * (short > 0))


def visited(order: Order, bounds) -> list[list[int]]:
    """The rows of each batch between bounds as the order gives them, counted through the blocks."""
    ranges = order.ranges(np.asarray(bounds, np.int64))
    batches: list[list[int]] = [[] for _ in bounds[1:]]
    for step, *one in zip(*ranges, strict=True):
        rows = []
        for name, first, count in zip(
            *order.cut(type(ranges)(step, *(np.array([n]) for n in one))), strict=True
        ):
            window = order.window_of(int(name))
            numbers = [block * 16 + row for block in window.blocks.tolist()
                       for row in range(order.block_rows[block])]  # fmt: skip
            rows += [numbers[place] for place in window.places[first : first + count]]
        batches[step] += rows
    return batches


def by_the_formula(order: Order, position: int) -> int:
    """The row at a global position, from the definition in words, one position at a time."""
    epoch, q = divmod(position, order.sequences)
    rows, lanes, chunk = order.rows_per_block, order.lanes, order.chunk
    blocks = order.full[permutation(len(order.full), order.seed, epoch)]
    each, left_over = divmod(len(blocks), lanes)
    in_lanes, in_left_over = lanes * each * rows, left_over * rows
    windows = -(-each // order.window)
    if not each:
        lane, window, place, mine = 0, 0, q, np.arange(len(order.block_rows))
    elif q < in_lanes:
        turn, rest = divmod(q, chunk * lanes)
        lane, o = divmod(rest, chunk)
        window, place = divmod(turn * chunk + o, order.window * rows)
        mine = blocks[: lanes * each][lane::lanes][window * order.window :][: order.window]
    elif q < in_lanes + in_left_over:
        turn, rest = divmod(q - in_lanes, chunk * left_over)
        lane, o = divmod(rest, chunk)
        mine = blocks[lanes * each + lane][None]
        lane, window, place = lanes + lane, windows, turn * chunk + o
    else:
        lane, window, place = lanes + left_over, windows, q - in_lanes - in_left_over
        mine = order.short
    numbers = [block * rows + row for block in mine for row in range(order.block_rows[block])]
    return numbers[permutation(len(numbers), order.seed, epoch, lane, window)[place]]


shapes = st.tuples(
    st.integers(1, 40), st.integers(0, 15), st.integers(1, 8), st.integers(1, 4), st.integers(0, 9)
)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_each_epoch_visits_every_sequence_once(shape):
    full, short, lanes, window, seed = shape
    order = DealtOrder(sizes(full, short), seed, lanes, window, chunk=4)
    n = order.sequences
    for epoch in (0, 1, 5):
        (rows,) = visited(order, [epoch * n, (epoch + 1) * n])
        assert len(set(rows)) == len(rows) == n == 16 * full + short


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2000), st.lists(st.integers(0, 90), min_size=1, max_size=5))
def test_a_batch_holds_what_the_formula_says(shape, start, batches):
    full, short, lanes, window, seed = shape
    order = DealtOrder(sizes(full, short), seed, lanes, window, chunk=4)
    bounds = start + np.cumsum([0, *batches])
    for batch, first, end in zip(visited(order, bounds), bounds, bounds[1:], strict=False):
        assert sorted(batch) == sorted(by_the_formula(order, g) for g in range(first, end))


def test_a_slice_of_a_batch_lies_in_few_lanes():
    order = DealtOrder(np.full(64 * 8, 64), 0)
    ranges = order.ranges(np.arange(11) * 4096)
    for step in range(10):
        of_step = ranges.take(ranges.step == step)
        assert of_step.lane.tolist() == list(range(64))
        assert of_step.size.tolist() == [64] * 64


def test_epochs_and_seeds_differ():
    order = DealtOrder(sizes(30, 5), 0, lanes=4)
    n = order.sequences
    epochs = visited(order, [0, n, 2 * n])
    (other,) = visited(DealtOrder(sizes(30, 5), 1, lanes=4), [0, n])
    for a, b in [(epochs[0], epochs[1]), (epochs[0], other)]:
        assert np.mean(np.array(a) == np.array(b)) < 0.05


def test_fewer_blocks_than_lanes_are_shuffled_as_a_whole():
    order = DealtOrder(np.full(30, 16), 0)
    (rows,) = visited(order, [0, 128])
    assert len({row // 16 for row in rows}) > 25  # of 30: a batch draws from all of them


def test_order_does_not_change_between_versions():
    # A saved position is worth something only while these numbers stay: else raise ORDER_VERSION.
    assert permutation(8, 1, 2, 3).tolist() == [7, 2, 0, 6, 1, 3, 5, 4]
    order = DealtOrder(np.array([16] * 9 + [3]), 7, lanes=4, window=2, chunk=4)
    batches = visited(order, [0, 1, 2, 41, 42, 144, 145, 147, 148, 400, 401])
    assert [rows for rows in batches if len(rows) == 1] == [[88], [86], [46], [144], [9], [8]]


def test_a_billion_sequences_are_planned_without_counting_them():
    block_rows = np.full(244_141, 4096)
    tracemalloc.start()
    order = DealtOrder(block_rows, 0)
    names, _, _ = order.cut(order.ranges(np.array([10**9 - 256, 10**9 + 256])))
    for name in np.unique(names).tolist():
        order.window_of(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_splitmix64_is_the_published_one():
    first_of_seed = splitmix64(np.array([1234567], np.uint64))
    assert first_of_seed.tolist() == [6457827717110365317]


def test_two_short_blocks_are_refused():
    with pytest.raises(ValueError, match="at most one"):
        DealtOrder(np.array([16, 3, 3]), 0)
