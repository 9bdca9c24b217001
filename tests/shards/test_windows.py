from types import SimpleNamespace

import numpy as np
import pytest

from shards.format.blocks import BLOCK
from shards.read.orders import DealtOrder
from shards.read.windows import TABLED, Windows


def blocks_of(lengths: list[np.ndarray], dtype: str, pad_id: int):
    """What an Index and its BlockReader give, for blocks of random tokens."""
    rng = np.random.default_rng(0)
    blocks = [
        (n.astype(np.uint16), rng.integers(9, 60_000, n.sum()).astype(dtype)) for n in lengths
    ]
    table = np.zeros(len(blocks), BLOCK)
    table["sequences"] = [len(n) for n, _ in blocks]
    table["tokens"] = [len(tokens) for _, tokens in blocks]
    index = SimpleNamespace(
        dtype=dtype,
        pad_id=pad_id,
        eos_id=1,
        max_length=max(int(n.max()) for n in lengths),
        store=SimpleNamespace(readers=1),
    )
    reader = SimpleNamespace(
        table=table,
        first=np.cumsum(table["sequences"]) - table["sequences"],
        read=blocks.__getitem__,
    )
    return index, reader


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("pad_id", [0, 5])
@pytest.mark.parametrize("longest", [7, TABLED + 40])
def test_rows_are_gathered_with_their_own_tokens_and_pads(dtype, pad_id, longest):
    rng = np.random.default_rng(1)
    sizes = [32] * 9 + [5]
    lengths = [rng.integers(1, longest + 1, size) for size in sizes]
    lengths[0][0] = longest
    index, reader = blocks_of(lengths, dtype, pad_id)
    order = DealtOrder(np.array(sizes), 0, lanes=2, window=2, chunk=4)
    windows = Windows(index, reader, order)
    rows = [
        tokens[end - n : end]
        for n_block, tokens in map(reader.read, range(len(sizes)))
        for n, end in zip(n_block.tolist(), np.cumsum(n_block, dtype=int).tolist(), strict=True)
    ]
    seen = []
    for start in range(0, 2 * order.sequences, 31):
        found = windows.find(order.ranges(np.array([start, start + 31])))
        for width in (longest, longest + 8):
            ids = windows.gather(windows.tokens, found.starts, found.lengths, width)
            assert ids.dtype == np.int64
            for row, number in zip(ids, found.sequence, strict=True):
                padding = [pad_id] * (width - len(rows[number]))
                assert row.tolist() == rows[number].tolist() + padding
        seen += found.sequence.tolist()
    n = order.sequences
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == list(range(n))


def test_windows_that_are_over_give_their_room_to_others():
    index, reader = blocks_of([np.full(32, 3)] * 64, "uint16", 0)
    order = DealtOrder(np.full(64, 32), 0, lanes=2, window=2, chunk=4)
    windows = Windows(index, reader, order)
    for start in range(0, 10 * order.sequences, 64):
        windows.find(order.ranges(np.array([start, start + 64])))
        windows.settle()
    assert len(windows._places) <= 6  # two lanes, each with a window, the one before and the next


def test_what_is_settled_stays_while_others_are_looked_for():
    index, reader = blocks_of([np.full(32, 3)] * 64, "uint16", 0)
    order = DealtOrder(np.full(64, 32), 0, lanes=2, window=2, chunk=4)
    windows = Windows(index, reader, order)
    for start in range(0, order.sequences, 64):
        found = windows.find(order.ranges(np.array([start, start + 64])))
        windows.settle()
    tokens = windows.tokens
    before = windows.gather(tokens, found.starts, found.lengths, 3)
    for start in range(order.sequences, 2 * order.sequences, 64):
        windows.find(order.ranges(np.array([start, start + 64])))
    assert windows.gather(tokens, found.starts, found.lengths, 3).tolist() == before.tolist()
