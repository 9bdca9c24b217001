"""The order of version 3: lanes of regions."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from shards import ShardStream
from shards.format.blocks import BLOCK
from shards.read.dataset import Mixing
from shards.read.dealer import Dealer
from shards.read.order import permutation
from shards.read.orders import DealtOrder, RegionOrder, reversed_bits
from shards.read.windows import Windows
from tests.shards.test_order import sizes, visited

BILLION = np.full(244_140, 4096)
LANES = st.sampled_from([1, 2, 8, 32])


def node(order, rank: int, world_size: int, batch: int) -> Dealer:
    """What deals a rank's share, or a node's: ranks beside each other are a wider one."""
    table = np.zeros(len(order.block_rows), BLOCK)
    table["sequences"], table["tokens"] = order.block_rows, 13 * order.block_rows
    index = SimpleNamespace(max_length=32, dtype="uint16", store=SimpleNamespace(readers=1))
    reader = SimpleNamespace(table=table)
    windows = Windows(index, reader, order)
    share = batch // world_size
    return Dealer([windows], Mixing([1]), batch, rank, world_size, share, False, None, False)


def blocks_read(order, rank: int, world_size: int, batch: int, steps: int, step: int = 0) -> set:
    dealer = node(order, rank, world_size, batch)
    (names,) = dealer.windows(step * batch, steps)
    return {block for name in names for block in order.blocks_of(name).tolist()}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 15), LANES, st.integers(0, 9))
def test_each_epoch_visits_every_sequence_once(full, short, lanes, seed):
    order = RegionOrder(sizes(full, short), seed, lanes)
    n = order.sequences
    for epoch in (0, 1, 5):
        (rows,) = visited(order, [epoch * n, (epoch + 1) * n])
        assert len(set(rows)) == len(rows) == n == 16 * full + short


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 150),
    LANES,
    st.integers(0, 3000),
    st.lists(st.integers(0, 90), min_size=1, max_size=5),
)
def test_batches_of_any_sizes_hold_what_single_positions_do(full, lanes, start, batches):
    order = RegionOrder(sizes(full, 5), 7, lanes)
    bounds = start + np.cumsum([0, *batches])
    single = [row for (row,) in visited(order, np.arange(start, bounds[-1] + 1))]
    for batch, first, end in zip(visited(order, bounds), bounds, bounds[1:], strict=False):
        assert sorted(batch) == sorted(single[first - start : end - start])


def test_a_lane_visits_its_region_and_all_take_turns():
    order = RegionOrder(np.full(67, 16), 3, 8)
    rows = [row for (row,) in visited(order, np.arange(8 * 8 * 16 + 1))]
    lanes = [0, 4, 2, 6, 1, 5, 3, 7]
    for place, row in enumerate(rows):
        lane = lanes[place % 8]
        assert lane * 67 // 8 <= row // 16 < (lane + 1) * 67 // 8
    assert len({row // 16 for row in rows[: 8 * 16]}) == 8  # a block of each at a time
    (rest,) = visited(order, [8 * 8 * 16, 67 * 16])
    regions = [range(lane * 67 // 8, (lane + 1) * 67 // 8) for lane in range(8)]
    of_nine = [region for region in regions if len(region) == 9]
    found = {row // 16 for row in rest}
    assert [len(found & {*region}) for region in regions] == [len(r) - 8 for r in regions]
    assert len(of_nine) == 3


def test_lanes_turn_in_the_order_of_reversed_bits():
    assert reversed_bits(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert reversed_bits(1).tolist() == [0]


@pytest.mark.parametrize(
    ("blocks", "size", "lanes"),
    [
        (63, 10**5, 0),
        (64, 10**5, 16),
        (256, 10**5, 64),
        (4095, 10**5, 512),
        (8192, 10**5, 2048),
        (10**6, 177_000, 2048),
        (10**6, 2**20, 256),
        (10**6, 2**30, 1),
    ],
)
def test_lanes_follow_from_the_data_alone(blocks, size, lanes):
    assert RegionOrder.lanes_of(blocks, size) == lanes


@pytest.mark.parametrize("nodes", [2, 3, 7, 16, 60, 96, 100, 128])
def test_a_node_reads_little_more_than_its_share(nodes):
    order = RegionOrder(BILLION, 0, 2048)
    batch = nodes * 8 * 64
    for part in (0, nodes // 2, nodes - 1):
        steps = 2048 * 4096 // batch + 1  # a window of every lane
        read = blocks_read(order, part, nodes, batch, steps)
        assert len(read) * 4096 <= 1.1 * steps * batch / nodes + 4096 * 2048 / nodes + 4096


@pytest.mark.parametrize("nodes", [3, 8, 60])
def test_in_an_epoch_nodes_read_their_own_part_the_same_in_the_next(nodes):
    order = RegionOrder(np.full(6000, 16), 5, 1024)
    batch, n = nodes * 64, 6000 * 16
    for part in (0, nodes // 2, nodes - 1):
        epochs = [
            blocks_read(order, part, nodes, batch, n // batch, epoch * n // batch + 1)
            for epoch in range(2)
        ]
        fair = 6000 / nodes
        assert len(epochs[0]) < 1.1 * fair + 8
        assert len(epochs[0] | epochs[1]) < 1.1 * fair + 16
        before = DealtOrder(np.full(6000, 16), 5)
        assert len(blocks_read(before, part, nodes, batch, n // batch)) > 0.9 * min(
            6000, 6000 / min(nodes, 64)
        )


@pytest.mark.parametrize("blocks", [3, 64, 300, 515])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_a_share_is_that_part_of_what_all_ranks_visit(blocks, world):
    lanes = RegionOrder.lanes_of(blocks, 100)
    order = RegionOrder(sizes(blocks, 5), 2, lanes)
    share, n, found = 24 // world, order.sequences, 0
    for start in (0, n // 2, n - n % 24, n - blocks % max(1, lanes) * 16 - 48, 2 * n - 30):
        bounds = start + 24 * np.arange(5)
        for rank in range(world):
            own = order.share(bounds, rank * share, (rank + 1) * share)
            if own is None:
                continue
            found += 1
            dealer = node(order, rank, world, 24)
            with patch.object(order, "share", lambda *_: None):
                expected, _ = dealer._ranges(start, 4)
            for one, other in zip(own, expected, strict=True):
                assert one.tolist() == other.tolist()
    assert found >= 2 * world


def test_a_rank_has_its_own_lanes_whatever_the_batch():
    order = RegionOrder(BILLION, 0, 2048)
    for batch in (64, 512, 2048, 8192):
        ranges, _ = node(order, 3, 8, batch)._ranges(10**6 * batch, 64)
        assert set(ranges.lane.tolist()) <= set(range(3 * 256, 4 * 256))


def test_each_epoch_has_an_order_of_its_own_within_lanes():
    order = RegionOrder(np.full(2560, 16), 3, 64)
    first, second = (
        [order._blocks(epoch, 5, window)[0] for window in range(40)] for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second) == list(range(200, 240))
    assert first != second
    runs = np.abs(np.diff(first)) <= 32
    assert runs.mean() > 0.9  # what is visited soon after the other lies near it


def test_it_does_not_change_between_versions():
    # A saved position is worth something only while these numbers stay: else add an order.
    order = RegionOrder(np.array([16] * 35 + [3]), 7, 16)
    batches = visited(order, [0, 1, 2, 41, 42, 511, 512, 559, 560, 562, 563, 1500, 1501])
    single = [rows for rows in batches if len(rows) == 1]
    assert single == [[24], [291], [324], [539], [370], [560], [227]]


def test_a_position_of_the_version_before_goes_on_in_its_order(many_blocks):
    def stream(**options):
        return ShardStream(many_blocks, seed=3, global_batch_size=24, **options)

    with stream(order_version=2) as old, stream() as going_on, stream() as new:
        for _ in range(9):
            next(old)
        state = old.state_dict()
        assert state["order_version"] == 2
        shape = {"lanes": 64, "window": 4, "chunk": 16}  # which version 0.1 tells too
        going_on.load_state_dict(state | shape)
        new.load_state_dict(new.state_dict() | {"consumed": old.consumed})
        for _ in range(40):
            expected = next(old).sequence.tolist()
            assert next(going_on).sequence.tolist() == expected
            assert next(new).sequence.tolist() != expected
        assert going_on.state_dict()["order_version"] == 2


def test_a_small_data_set_is_shuffled_as_it_was(dataset):
    with (
        ShardStream(dataset, seed=3, global_batch_size=24, order_version=2) as old,
        ShardStream(dataset, seed=3, global_batch_size=24) as new,
    ):
        for _ in range(99):
            assert next(old).sequence.tolist() == next(new).sequence.tolist()


def test_batches_draw_from_all_over_the_split():
    order = RegionOrder(np.full(1024, 16), 1, 256)
    for (batch,) in (visited(order, [at, at + 256]) for at in (0, 999, 40_000)):
        lanes = {row // 16 // 4 for row in batch}
        assert len(lanes) == 256


@pytest.fixture(scope="module")
def many_blocks(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")
    (folder / "lines.txt").write_text("\n".join(f"v{i} = {i % 7}" for i in range(5000)))
    options = {"tokenizer": "byte", "max_length": 40, "block_size": 16, "valid_fraction": 0}
    shards.build(folder / "lines.txt", folder / "data", **options)
    return folder / "data"


def test_permutations_are_not_those_of_other_keys():
    assert permutation(32, 0, 1, 2, 3).tolist() != permutation(32, 0, 1, 2, 3, 0).tolist()
