import gc
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from shards import ShardStream
from t5vae.common.errors import UserError

G = 12
BATCH = 24


@pytest.fixture(scope="module")
def many_blocks(dataset, tmp_path_factory):
    """About 5,400 sequences in enough blocks for lanes, with the tokenizer of `dataset`."""
    folder = tmp_path_factory.mktemp("many")
    lines = [f"other_{i} = {'+'.join('xyz'[: i % 4])}" for i in range(6000)]
    (folder / "lines.txt").write_text("\n".join(lines))
    options = {"tokenizer": dataset / "tokenizer", "max_length": 40, "block_size": 16}
    shards.build(folder / "lines.txt", folder / "data", **options, valid_fraction=0.1)
    return folder / "data"


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """Eight sequences of 65,528 to 65,535 tokens."""
    folder = tmp_path_factory.mktemp("long")
    with webdataset.TarWriter(str(folder / "ids.tar")) as writer:
        for length in range(65_528, 65_536):
            ids = np.arange(length, 2 * length - 1) % 200 + 10
            writer.write({"__key__": str(length), "ids.npy": ids})
    options = {"format": "webdataset", "tokenizer": "byte", "max_length": 65_535}
    shards.build(folder / "ids.tar", folder / "data", **options, valid_fraction=0)
    return folder / "data"


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


def rows(source, steps, **options) -> list[list[tuple[int, int]]]:
    """(source, sequence) of each row of each step, rank after rank."""
    world = options.pop("world_size", 1)
    seen: list[list[tuple[int, int]]] = [[] for _ in range(steps)]
    for rank in range(world):
        with stream(source, world_size=world, rank=rank, **options) as batches:
            for step in seen:
                before = batches.consumed
                while batches.consumed == before:
                    batch = next(batches)
                    step += zip(batch.source.tolist(), batch.sequence.tolist(), strict=True)
    return seen


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


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ranks_and_restarts_change_nothing(dataset, many_blocks, data):
    mixture = [{"path": dataset, "weight": 1}, {"path": many_blocks, "weight": 2.5}]
    source = data.draw(st.sampled_from([dataset, many_blocks, mixture]))
    by_length = data.draw(st.booleans())
    n = shards.open_dataset(source).sequences("train")
    start = n // BATCH * BATCH - data.draw(st.integers(0, 10)) * BATCH  # about an epoch's end
    options = {"global_batch_size": BATCH, "sort_by_length": by_length}
    whole = rows(source, 15, consumed=start, **options)
    parts, consumed, in_order = [], start, True
    for _ in range(5):
        world = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
        share = BATCH // world
        micro = data.draw(st.sampled_from([n for n in range(1, share + 1) if share % n == 0]))
        split = {"world_size": world, "micro_batch_size": micro}
        in_order &= micro == share and not by_length
        parts += rows(source, 3, consumed=consumed, **split, **options)
        consumed += 3 * BATCH
    assert [sorted(step) for step in parts] == [sorted(step) for step in whole]
    if in_order:
        assert parts == whole


@pytest.mark.parametrize("world", [1, 3, 8])
def test_every_sequence_once_an_epoch_at_any_world_size(many_blocks, world):
    n = shards.open_index(many_blocks).sequences("train")
    steps = 2 * n // BATCH + 1
    seen = rows(many_blocks, steps, world_size=world, global_batch_size=BATCH)
    numbers = [number for step in seen for _, number in step]
    assert sorted(numbers[:n]) == sorted(numbers[n : 2 * n]) == list(range(n))


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


def test_sorted_batches_need_less_padding_and_keep_the_mix_of_lengths(many_blocks):
    def padding(by_length, **options):
        shares = []
        for rank in range(2):
            options |= {"rank": rank, "world_size": 2, "global_batch_size": 128}
            with stream(many_blocks, sort_by_length=by_length, **options) as batches:
                shares += [(b.ids == 0).float().mean().item() for b in islice(batches, 40)]
        return np.mean(shares)

    assert padding(True, micro_batch_size=16) < 0.7 * padding(False, micro_batch_size=16)
    index = shards.open_index(many_blocks)
    corpus = index.read("train", np.arange(index.sequences("train")))[1]
    for step in rows(many_blocks, 10, sort_by_length=True, world_size=2, global_batch_size=512):
        lengths = index.read("train", np.array([number for _, number in step]))[1]
        assert abs(lengths.mean() - corpus.mean()) < 4 * corpus.std() / 512**0.5
        assert abs(lengths.std() - corpus.std()) < 0.2 * corpus.std()


def test_a_mixture_keeps_its_weights_in_every_stretch(dataset, many_blocks):
    mixture = [{"path": dataset, "weight": 0.3}, {"path": many_blocks, "weight": 0.7}]
    for step in rows(mixture, 20, global_batch_size=100, consumed=12_345):
        assert sum(source == 0 for source, _ in step) == 30
    with stream(mixture, global_batch_size=100) as batches:
        for _ in range(30):
            next(batches)
        first, second = (shards.open_index(p).sequences("train") for p in (dataset, many_blocks))
        assert batches.epochs == {str(dataset): 900 / first, str(many_blocks): 2100 / second}


def test_each_dataset_of_a_mixture_is_gone_through_once_an_epoch(dataset, many_blocks):
    sizes = [shards.open_index(path).sequences("train") for path in (dataset, many_blocks)]
    seen = [row for step in rows([dataset, many_blocks], 300, world_size=3) for row in step]
    for source, size in enumerate(sizes):
        numbers = [number for of, number in seen if of == source]
        assert len(numbers) == 300 * G / 2
        for start in range(0, len(numbers), size):
            epoch = numbers[start : start + size]
            assert len(set(epoch)) == len(epoch)


def test_a_mixture_delivers_what_its_datasets_hold(dataset, many_blocks):
    indexes = [shards.open_index(path) for path in (dataset, many_blocks)]
    with stream([dataset, many_blocks], micro_batch_size=4) as batches:
        for batch in islice(batches, 9):
            assert len(set(batch.source.tolist())) == 2  # in every micro batch
            for number, index in enumerate(indexes):
                mine = batch.source == number
                ids, lengths = index.read("train", batch.sequence[mine].numpy())
                assert batch.lengths[mine].tolist() == lengths.tolist()
                assert batch.ids[mine][:, : ids.shape[1]].tolist() == ids.tolist()
                assert not batch.ids[mine][:, ids.shape[1] :].any()


def test_a_saved_state_resumes_and_a_foreign_one_is_refused(dataset):
    first = stream(dataset)
    list(islice(first, 5))
    state = first.state_dict()
    expected = next(first)
    second = stream(dataset, world_size=1)
    next(second)
    second.load_state_dict(state)
    assert next(second).sequence.tolist() == expected.sequence.tolist()
    for key, value in [("seed", 4), ("index_sha256", "other")]:
        with pytest.raises(UserError, match=f"{key} is {value}"):
            second.load_state_dict(state | {key: value})
    for version in (1, None, [3], "3"):
        with pytest.raises(UserError, match="is not known, but 2 and 3"):
            second.load_state_dict(state | {"order_version": version})
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


@pytest.mark.parametrize("by_length", [False, True])
def test_the_longest_sequences_that_a_block_can_hold_are_delivered_whole(long_rows, by_length):
    index = shards.open_index(long_rows)
    with stream(long_rows, global_batch_size=8, sort_by_length=by_length) as batches:
        batch = next(batches)
    for ids, length, number in zip(batch.ids, batch.lengths, batch.sequence, strict=True):
        expected, _ = index.read("train", number[None].numpy())
        assert ids[:length].equal(torch.from_numpy(expected[0, :length]))
        assert not ids[length:].any()
    assert batch.ids.shape[1] == 65_535
    assert sorted(batch.lengths.tolist()) == list(range(65_528, 65_536))


def test_a_width_is_rounded_up_beyond_what_a_length_can_be(long_rows):
    with stream(long_rows, global_batch_size=8, micro_batch_size=1) as batches:
        widths = {int(b.lengths[0]): b.ids.shape[1] for b in islice(batches, 8)}
    assert widths == {65_528: 65_528, **dict.fromkeys(range(65_529, 65_536), 65_535)}


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
