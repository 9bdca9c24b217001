import shutil
import tarfile

import pytest

import shards
from shards import DamageError, ShardStream, UserError

SHARD = "train-00001.tar"


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def offset_of(copy, block):
    index = shards.open_index(copy)
    mine = index.blocks[index.blocks["shard"] == 1]
    return int(mine[block]["tokens_offset"]) + 5


def cut_at_a_record(copy):
    with tarfile.open(copy / SHARD) as tar:
        end = tar.getmembers()[2].offset
    with open(copy / SHARD, "r+b") as file:
        file.truncate(end)


def cut_within_a_record(copy):
    with open(copy / SHARD, "r+b") as file:
        file.truncate(offset_of(copy, 1))


def flip_a_token(copy):
    flip(copy / SHARD, offset_of(copy, 1))


def remove_a_shard(copy):
    (copy / SHARD).unlink()


def swap_shards(copy):
    (copy / SHARD).rename(copy / "other")
    (copy / "train-00000.tar").rename(copy / SHARD)
    (copy / "other").rename(copy / "train-00000.tar")


DAMAGES = [cut_at_a_record, cut_within_a_record, flip_a_token, remove_a_shard, swap_shards]


def epoch(copy, **options):
    n = shards.open_index(copy).sequences("train")
    with ShardStream(copy, seed=0, global_batch_size=n, **options) as stream:
        return next(stream), stream.quarantined


@pytest.mark.parametrize("damage", DAMAGES)
def test_stream_and_verify_name_shard_and_block(copy, damage):
    damage(copy)
    with pytest.raises(DamageError, match=r"train-0000\d.tar, block \d+"):
        epoch(copy)
    problems = shards.verify(copy).problems
    assert any(SHARD in problem for problem in problems)
    assert any(f"{SHARD}, block " in problem for problem in problems)


def test_verify_names_only_the_block_that_is_damaged(copy):
    flip_a_token(copy)
    problems = shards.verify(copy).problems
    assert len(problems) == 2  # the shard's sha256 and the block
    assert problems[1].endswith(f"{SHARD}, block 1 is damaged (its checksum differs)")


def test_skipped_blocks_become_rows_of_weight_0(copy):
    whole, _ = epoch(copy)
    flip_a_token(copy)
    batch, quarantined = epoch(copy, on_corrupt="skip")
    assert quarantined == 1
    assert batch.sequence.tolist() == whole.sequence.tolist()
    bad = batch.weights == 0
    assert bad.sum() == 32
    assert (batch.lengths[bad] == 1).all()
    assert (batch.ids[bad].sum(1) == 1).all()
    width = min(batch.ids.shape[1], whole.ids.shape[1])
    assert batch.ids[~bad][:, :width].tolist() == whole.ids[~bad][:, :width].tolist()


@pytest.mark.parametrize("place", [20, -1], ids=["tar header", "tar end"])
def test_verify_sees_damage_outside_blocks(copy, place):
    flip(copy / SHARD, place)
    assert [SHARD in problem for problem in shards.verify(copy).problems] == [True]


def test_damaged_index_files(copy):
    flip(copy / "blocks.npy", 200)
    assert "blocks.npy" in shards.verify(copy).problems[0]
    with pytest.raises(DamageError, match=r"blocks\.npy"):
        epoch(copy)
    (copy / "index.json").write_text('{"format_version": 2}')
    assert "index.json" in shards.verify(copy).problems[0]
    (copy / "index.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="version 99, this program reads 2"):
        shards.open_index(copy)


def test_another_tokenizer_is_noticed(copy):
    shards.load_tokenizer("byte").save_pretrained(copy / "tokenizer")
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer" in shards.verify(copy).problems[0]


def test_a_whole_dataset_verifies(dataset):
    report = shards.verify(dataset)
    assert report.ok
    assert report.sequences == sum(
        split.sequences for split in shards.open_index(dataset).splits.values()
    )
