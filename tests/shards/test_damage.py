import re
import shutil
import tarfile
from itertools import islice

import pytest
import webdataset

import shards
from shards import ShardStream
from t5vae.common.errors import DamageError, UserError

SHARD = "train-00001.tar"


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """So many blocks that a stream does not hold all of them. Not to be changed."""
    folder = tmp_path_factory.mktemp("long")
    lines = [f"value_{i} = {i * 7919 % 1000}" for i in range(12000)]
    (folder / "lines.txt").write_text("\n".join(lines))
    options = {"tokenizer": "train:300", "max_length": 24, "valid_fraction": 0, "block_size": 16}
    shards.build(folder / "lines.txt", folder / "long", **options, shard_size=2**16)
    return folder / "long"


def flip(path, offset, bit=1):
    content = bytearray(path.read_bytes())
    content[offset] ^= bit
    path.write_bytes(content)


def members(copy):
    with tarfile.open(copy / SHARD) as tar:
        return tar.getmembers()


def offset_of(copy, block, name="tokens_offset"):
    index = shards.open_index(copy)
    return int(index.blocks[index.blocks["shard"] == 1][block][name])


def cut(copy, size):
    with open(copy / SHARD, "r+b") as file:
        file.truncate(size)


def cut_at_a_record(copy):
    cut(copy, members(copy)[2].offset)


def cut_within_a_record(copy):
    cut(copy, offset_of(copy, 1) + 5)


def flip_a_token(copy):
    flip(copy / SHARD, offset_of(copy, 1) + 5)


def flip_a_tar_header(copy):
    flip(copy / SHARD, members(copy)[3].offset + 20)


def flip_an_npy_header(copy):
    flip(copy / SHARD, offset_of(copy, 1) - 90)


def cut_off_the_end(copy):
    cut(copy, offset_of(copy, -1) + members(copy)[-1].size)


def remove_a_shard(copy):
    (copy / SHARD).unlink()


def swap_shards(copy):
    (copy / SHARD).rename(copy / "other")
    (copy / "train-00000.tar").rename(copy / SHARD)
    (copy / "other").rename(copy / "train-00000.tar")


def epoch(copy, **options):
    n = shards.open_index(copy).sequences("train")
    with ShardStream(copy, seed=0, global_batch_size=n, **options) as stream:
        return next(stream), stream.quarantined


def problems(copy):
    """What verify finds, without the dataset's path, however many threads it uses."""
    found = shards.verify(copy).problems
    assert shards.verify(copy, workers=1).problems == found
    return [problem.removeprefix(f"{copy}/") for problem in found]


@pytest.mark.parametrize(
    "damage",
    [cut_at_a_record, cut_within_a_record, flip_a_token, remove_a_shard, swap_shards],
)
def test_the_stream_names_shard_and_block(copy, damage):
    damage(copy)
    with pytest.raises(DamageError, match=r"train-0000\d.tar, block \d+"):
        epoch(copy)


@pytest.mark.parametrize("damage", [flip_a_tar_header, flip_an_npy_header, cut_off_the_end])
def test_the_stream_does_not_need_headers(copy, dataset, damage):
    damage(copy)
    assert epoch(copy)[0].ids.tolist() == epoch(dataset)[0].ids.tolist()


@pytest.mark.parametrize("damage", [cut_at_a_record, flip_a_token])
def test_plain_webdataset_passes_damage_without_a_word(copy, dataset, damage):
    def records(folder):
        url = str(folder / SHARD)
        return [
            (record["lengths.npy"].tolist(), record["tokens.npy"].tolist())
            for record in webdataset.WebDataset(url, shardshuffle=False).decode()
        ]

    damage(copy)
    assert records(copy)
    assert records(copy) != records(dataset)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            cut_at_a_record,
            [
                r"SHARD has [\d,]+ bytes instead of [\d,]+",
                r"SHARD, block 1 is cut off \(the shard is too short\); so are the \d after it",
            ],
        ),
        (
            cut_within_a_record,
            [
                r"SHARD has [\d,]+ bytes instead of [\d,]+",
                r"SHARD, block 1 is cut off \(the shard is too short\); so are the \d after it",
            ],
        ),
        (
            flip_a_token,
            [
                r"SHARD is not what was written \(its sha256 differs\)",
                r"SHARD, block 1 is damaged \(its checksum differs\)",
            ],
        ),
        (
            flip_a_tar_header,
            [
                r"SHARD is not what was written \(its sha256 differs\), but its blocks are whole",
                r"SHARD, block 1 is whole, but a tar header of it is damaged: other tar readers .*",
            ],
        ),
        (
            flip_an_npy_header,
            [
                r"SHARD is not what was written \(its sha256 differs\), but its blocks are whole",
                r"SHARD, block 1 is whole, but an npy header of it is damaged: other .*",
            ],
        ),
        (
            cut_off_the_end,
            [
                r"SHARD has [\d,]+ bytes instead of [\d,]+, but its blocks are whole",
                r"SHARD has no whole end-of-archive: other tar readers may fail",
            ],
        ),
        (remove_a_shard, [r"SHARD is missing"]),
        (
            swap_shards,
            [
                r"train-00000.tar holds what SHARD should: bring both back",
                r"SHARD holds what train-00000.tar should: bring both back",
            ],
        ),
    ],
)
def test_verify_names_the_damage(copy, damage, expected):
    damage(copy)
    found = problems(copy)
    assert len(found) == len(expected), found
    for line, pattern in zip(found, expected, strict=True):
        assert re.fullmatch(pattern.replace("SHARD", SHARD), line)


def test_verify_sees_every_byte(copy, dataset):
    size = (copy / SHARD).stat().st_size
    for offset in [*range(0, size, 211), size - 1]:
        flip(copy / SHARD, offset, 1 << offset % 8)
        assert any(SHARD in problem for problem in shards.verify(copy, workers=1).problems)
        shutil.copy(dataset / SHARD, copy / SHARD)


def test_skipped_blocks_become_rows_of_weight_0(copy):
    whole, _ = epoch(copy)
    flip_a_token(copy)
    batch, quarantined = epoch(copy, on_corrupt="skip")
    assert quarantined == 32
    assert batch.sequence.tolist() == whole.sequence.tolist()
    bad = batch.weights == 0
    assert bad.sum() == 32
    assert (batch.lengths[bad] == 1).all()
    assert (batch.ids[bad].sum(1) == 1).all()
    width = min(batch.ids.shape[1], whole.ids.shape[1])
    assert batch.ids[~bad][:, :width].tolist() == whole.ids[~bad][:, :width].tolist()


@pytest.mark.parametrize("damage", [cut_at_a_record, remove_a_shard, swap_shards])
def test_blocks_that_cannot_be_read_are_counted(copy, damage):
    damage(copy)
    batch, quarantined = epoch(copy, on_corrupt="skip")
    assert 32 < quarantined == (batch.weights == 0).sum() < len(batch.weights)


@pytest.mark.parametrize("sort_by_length", [False, True])
@pytest.mark.parametrize(("world", "micro"), [(1, 20), (2, 5), (4, 5)])
def test_quarantined_counts_rows_once_and_goes_on_after_a_resume(
    copy, world, micro, sort_by_length
):
    for damage in (flip_a_token, lambda copy: flip(copy / "train-00002.tar", 3000)):
        damage(copy)
    steps, total = 100, 0
    for rank in range(world):
        options = {"seed": 1, "global_batch_size": 20, "on_corrupt": "skip"}
        options |= {"rank": rank, "world_size": world, "micro_batch_size": micro}
        options |= {"sort_by_length": sort_by_length}
        own, state = 0, None
        for _ in range(4):  # two epochs and some
            with ShardStream(copy, **options) as stream:
                if state:
                    stream.load_state_dict(state)
                for _ in range(steps // 4 * (20 // world // micro)):
                    own += int((next(stream).weights == 0).sum())
                assert stream.quarantined == own
                state = stream.state_dict()
                next(stream)  # is not of the state
                stream.close()  # within a step, which is dealt again
                if 20 // world > micro:
                    assert stream.state_dict() == state
        total += own
    with ShardStream(copy, seed=1, global_batch_size=20, on_corrupt="skip") as stream:
        rows = sum(int((batch.weights == 0).sum()) for batch in islice(stream, steps))
        assert total == rows == stream.quarantined > 64


def test_a_state_that_does_not_tell_of_quarantine_counts_from_0(copy):
    with ShardStream(copy, seed=0, global_batch_size=8) as stream:
        next(stream)
        state = stream.state_dict()
        del state["quarantined"]
        stream.load_state_dict(state)
        assert (stream.consumed, stream.quarantined) == (8, 0)


@pytest.mark.parametrize("by_rename", [True, False], ids=["renamed", "overwritten"])
@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
def test_no_row_is_wrong_where_a_shard_changes_under_a_stream(
    long, tmp_path, by_rename, on_corrupt
):
    copy = shutil.copytree(long, tmp_path / "copy")
    other = bytes(byte ^ 1 for byte in (copy / SHARD).read_bytes())
    steps = shards.open_index(copy).sequences("train") // 100
    options = {"seed": 0, "global_batch_size": 100, "pad_to": 24}
    with ShardStream(long, **options) as stream:
        right = list(islice(stream, steps))
    seen, error = [], ""
    with ShardStream(copy, **options, on_corrupt=on_corrupt) as stream:
        try:
            seen.append(next(stream))
            (copy / "new").write_bytes(other)
            if by_rename:
                (copy / "new").rename(copy / SHARD)
            else:
                shutil.copyfile(copy / "new", copy / SHARD)
            seen += islice(stream, steps - 1)
        except DamageError as raised:
            error = str(raised)
        quarantined = stream.quarantined
    for here, there in zip(seen, right, strict=False):
        whole = here.weights == 1
        assert here.sequence.tolist() == there.sequence.tolist()
        assert here.ids[whole].tolist() == there.ids[whole].tolist()
    if by_rename:
        assert (len(seen), quarantined, error) == (steps, 0, "")
    elif on_corrupt == "skip":
        assert len(seen) == steps
        assert quarantined
    else:
        assert re.search(rf"{SHARD}, block \d+ is damaged", error)


def test_damaged_blocks_npy(copy):
    flip(copy / "blocks.npy", 200)
    assert problems(copy) == ["blocks.npy is missing or damaged: build the dataset again"]
    with pytest.raises(DamageError, match=r"blocks\.npy"):
        epoch(copy)


def flip_last_digit(copy, pattern):
    text = (copy / "index.json").read_text()
    found = re.search(pattern, text, re.DOTALL)
    assert found, pattern
    flip(copy / "index.json", len(text[: found.end() - 1].encode()))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (r'"splits".*?"sequences": *\d+', "the totals of split train are wrong"),
        (r'"splits".*?"tokens": *\d+', "the totals of split train are wrong"),
        (r'"splits".*?"blocks": *\d+', "the totals of split train are wrong"),
        (
            r'"length_histogram": *\[[\s\d,]*?[1-9]\d+',
            "the length histogram of split train is wrong",
        ),
        (r'"shards": *\[.*?"sequences": *\d+', "the totals of train-00000.tar are wrong"),
        (r'"shards": *\[.*?"tokens": *\d+', "the totals of train-00000.tar are wrong"),
        (r'"shards": *\[.*?"blocks": *\d+', "the totals of train-00000.tar are wrong"),
        (r'"shards": *\[.*?"bytes": *\d+', "the bytes of train-00000.tar are wrong"),
        (r'"max_length": *\d+', "max_length is 25, but 24 in the recipe"),
        (r'"block_size": *\d+', "block_size is 33, but 32 in the recipe"),
        (r'"vocab_size": *\d+', "differ in the size of the vocabulary or its special tokens"),
        (r'"pad_id": *\d', "differ in the size of the vocabulary or its special tokens"),
        (r'"eos_id": *\d', "has sequences without an end token"),
        (r'"tokenizer_fingerprint": *"[^"]*\d', "is not the tokenizer the dataset was built with"),
        (r'"shards": *\[.*?"sha256": *"[^"]*\d', "its sha256 differs), but its blocks are whole"),
        (r'"blocks_sha256": *"[^"]*\d', "blocks.npy is missing or damaged"),
        (r'"name": *"train-0000\d', "train-00001.tar holds what"),
    ],
)
def test_verify_sees_a_flipped_bit_in_a_number_of_the_index(copy, number, expected):
    flip_last_digit(copy, number)
    assert any(expected in problem for problem in problems(copy))


def test_an_index_that_is_none(copy):
    flip(copy / "index.json", 0)
    assert problems(copy)[0].startswith("index.json is not a dataset's index or is damaged: build")
    with pytest.raises(DamageError, match=r"index\.json"):
        epoch(copy)
    (copy / "index.json").write_text('{"format_version": 2}')
    assert "index.json" in shards.verify(copy).problems[0]
    (copy / "index.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="version 99, this program reads 2"):
        shards.open_index(copy)


def test_another_tokenizer_is_noticed(copy):
    shards.load_tokenizer("byte").save_pretrained(copy / "tokenizer")
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert problems(copy)[0] == "tokenizer is not the tokenizer the dataset was built with"


def test_a_whole_dataset_verifies_whatever_else_is_in_its_folder(copy):
    shutil.copy(copy / SHARD, copy / "train-00099.tar")
    report = shards.verify(copy)
    assert report.ok
    assert report.path == str(copy)
    assert report.sequences == sum(
        split.sequences for split in shards.open_index(copy).splits.values()
    )
