import gc
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from shards import ShardStream, UserError

G = 12


def stream(path, **options):
    return ShardStream(path, **{"seed": 3, "global_batch_size": G} | options)


def sequences(path, steps, **options) -> np.ndarray:
    """int64 [steps * G]: what one process, or all ranks together, see."""
    world = options.pop("world_size", 1)
    ranks = []
    for rank in range(world):
        with stream(path, world_size=world, rank=rank, **options) as batches:
            ranks.append([b.sequence.numpy() for b in islice(batches, steps)])
    return np.concatenate([rows for step in zip(*ranks, strict=True) for rows in step])


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "shards-prefetch"]


def test_a_batch_is_what_the_index_holds(dataset):
    index = shards.open_index(dataset)
    batch = next(stream(dataset))
    ids, lengths = index.read("train", batch.sequence.numpy())
    width = ids.shape[1]
    assert batch.ids[:, :width].tolist() == ids.tolist()
    assert not batch.ids[:, width:].any()
    assert batch.ids.shape[1] % 8 == 0
    assert batch.lengths.tolist() == lengths.tolist()
    assert [t.dtype for t in (batch.ids, batch.lengths, batch.sequence, batch.source)] == (
        [torch.int64] * 4
    )
    assert batch.weights.dtype == torch.float32
    assert batch.weights.tolist() == [1.0] * G
    assert batch.source.tolist() == [0] * G
    assert batch.consumed == G


def test_every_sequence_once_an_epoch_and_batches_straddle_epochs(dataset):
    n = shards.open_index(dataset).sequences("train")
    assert n % G  # else nothing straddles
    seen = sequences(dataset, 2 * n // G + 1)
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == list(range(n))
    assert (seen[:n] != seen[n : 2 * n]).any()


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_ranks_and_restarts_change_nothing(dataset, data):
    n = shards.open_index(dataset).sequences("train")
    start = (n // G - 3) * G  # shortly before an epoch's end
    whole = sequences(dataset, 12, consumed=start)
    parts, consumed = [], start
    for _ in range(3):
        world = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
        parts.append(sequences(dataset, 4, world_size=world, consumed=consumed))
        consumed += 4 * G
    assert np.concatenate(parts).tolist() == whole.tolist()


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 3), (3, 2)])
def test_micro_batches_and_sorting_keep_the_global_batch(dataset, world, micro, by_length):
    steps, per_step = 3, G // world // micro
    whole = sequences(dataset, steps).reshape(steps, G)
    seen = [[] for _ in range(steps)]
    for rank in range(world):
        batches = stream(
            dataset, rank=rank, world_size=world, micro_batch_size=micro, sort_by_length=by_length
        )
        last = 0
        for number, batch in enumerate(islice(batches, steps * per_step)):
            step, place = divmod(number, per_step)
            assert len(batch.ids) == micro
            assert batch.consumed == (step + (place == per_step - 1)) * G
            assert batches.state_dict()["consumed"] == batch.consumed
            if by_length and place:
                assert batch.lengths.min() >= last
            last = batch.lengths.max()
            seen[step] += batch.sequence.tolist()
        batches.close()
    for step in range(steps):
        assert sorted(seen[step]) == sorted(whole[step])
    if not by_length and world == 1:
        assert np.concatenate(seen).tolist() == whole.ravel().tolist()


def test_a_saved_state_resumes_and_a_foreign_one_is_refused(dataset):
    first = stream(dataset)
    list(islice(first, 5))
    state = first.state_dict()
    expected = next(first)
    second = stream(dataset, world_size=1)
    next(second)
    second.load_state_dict(state)
    assert next(second).sequence.tolist() == expected.sequence.tolist()
    for key, value in [("seed", 4), ("index_sha256", "other"), ("order_version", 0)]:
        with pytest.raises(UserError, match=f"{key} is {value}"):
            second.load_state_dict(state | {key: value})
    first.close()
    second.close()


def test_a_split_shorter_than_a_batch_wraps(dataset):
    n = shards.open_index(dataset).sequences("valid")
    with stream(dataset, split="valid", global_batch_size=3 * n) as batches:
        counts = np.bincount(next(batches).sequence.numpy())
    assert counts.tolist() == [3] * n


def test_fixed_width(dataset):
    with stream(dataset, pad_to=40) as batches:
        assert next(batches).ids.shape == (G, 40)


def test_closed_and_dropped_streams_end_their_threads(dataset):
    before = len(threads())
    streams = [stream(dataset) for _ in range(3)]
    for batches in streams:
        next(batches)
    assert len(threads()) == before + 3
    streams[0].close()
    del batches, streams
    gc.collect()
    deadline = time.monotonic() + 10
    while len(threads()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(threads()) == before


def test_a_closed_stream_goes_on_where_it_was(dataset):
    whole = sequences(dataset, 4)
    batches = stream(dataset)
    seen = [next(batches).sequence for _ in range(2)]
    batches.close()
    seen += [next(batches).sequence for _ in range(2)]
    batches.close()
    assert torch.cat(seen).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 5}, "5 ranks"),
        ({"micro_batch_size": 5}, "micro batches of 5"),
        ({"split": "test"}, "no split 'test'; it has: train, valid"),
        ({"pad_to": 10}, "pad_to 10"),
    ],
)
def test_bad_options_are_one_line(dataset, options, message):
    with pytest.raises(UserError, match=message):
        stream(dataset, **options)


def test_a_missing_dataset_names_the_build_command(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="t5vae shards build"):
            stream(path)
