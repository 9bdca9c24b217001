import errno
import os

import numpy as np
import pytest
import webdataset

import shards
from shards import UserError
from shards.pack import gather_ragged
from shards.tokenizers import fingerprint

OPTIONS = {"tokenizer": "byte", "max_length": 48, "block_size": 16, "valid_fraction": 0.1}


def everything(index, split):
    return index.texts(split, np.arange(index.sequences(split)))


def test_nothing_is_lost_and_no_text_is_in_both_splits(corpus, dataset):
    index = shards.open_index(dataset)
    train, valid = everything(index, "train"), everything(index, "valid")
    lines = corpus.read_text().splitlines()
    assert index.texts_read == len(lines)
    assert len(train) + len(valid) == len(lines) - sum(index.dropped.values())
    assert not set(train) & set(valid)
    assert set(train) | set(valid) <= set(lines)
    assert train != [line for line in lines if line in set(train)]  # shuffled


def test_stored_tokens_equal_tokenizing_again(dataset):
    index = shards.open_index(dataset)
    tokenizer = index.tokenizer()
    assert fingerprint(tokenizer) == index.tokenizer_fingerprint
    ids, lengths = index.read("train", np.arange(200))
    again = tokenizer(tokenizer.batch_decode(ids, skip_special_tokens=True))["input_ids"]
    assert [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)] == again


def test_plain_webdataset_reads_the_shards(dataset):
    index = shards.open_index(dataset)
    assert len(index.shards) > 2
    seen = 0
    for shard in index.shards:
        if shard.split != "train":
            continue
        for record in webdataset.WebDataset(str(dataset / shard.name), shardshuffle=False).decode():
            lengths, tokens = record["lengths.npy"], record["tokens.npy"]
            ids, expected = index.read("train", seen + np.arange(len(lengths)))
            assert lengths.tolist() == expected.tolist()
            assert tokens.tolist() == ids[ids != 0].tolist()
            assert tokens.dtype == np.dtype(index.dtype)
            seen += len(lengths)
    assert seen == index.sequences("train")


def test_totals_and_histograms_agree(dataset):
    index = shards.open_index(dataset)
    for name, split in index.splits.items():
        assert sum(split.length_histogram) == split.sequences
        assert np.dot(split.length_histogram, np.arange(len(split.length_histogram))) == (
            split.tokens
        )
        assert sum(shard.tokens for shard in index.shards if shard.split == name) == split.tokens
    kept = sum(split.sequences for split in index.splits.values())
    unique = sum(index.unique_lengths)
    assert index.share_within(index.max_length) == pytest.approx(kept / unique)


def test_same_input_and_options_give_the_same_bytes(corpus, dataset, tmp_path):
    options = {"tokenizer": "train:300", "max_length": 24, "valid_fraction": 0.1}
    shards.build(corpus, tmp_path / "b", **options, block_size=32, shard_size=8192)
    files = [path.relative_to(dataset) for path in sorted(dataset.rglob("*")) if path.is_file()]
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "b" / file).read_bytes() == (dataset / file).read_bytes(), file


def test_a_built_dataset_is_left_alone_and_other_options_are_refused(corpus, tmp_path, capsys):
    out = tmp_path / "d"
    first = shards.build(corpus, out, **OPTIONS)
    written = (out / "index.json").stat().st_mtime_ns
    assert shards.build(corpus, out, **OPTIONS) == first
    assert (out / "index.json").stat().st_mtime_ns == written
    assert "already built" in capsys.readouterr().err
    with pytest.raises(UserError, match="max_length 48, not 32"):
        shards.build(corpus, out, **OPTIONS | {"max_length": 32})
    (tmp_path / "lines.txt").write_text("another = 1\n")
    with pytest.raises(UserError, match="another input"):
        shards.build(tmp_path / "lines.txt", out, **OPTIONS | {"max_length": 48})


def test_a_foreign_folder_is_not_touched(corpus, tmp_path):
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(UserError, match="is no dataset"):
        shards.build(corpus, tmp_path, **OPTIONS)
    assert os.listdir(tmp_path) == ["precious"]


def test_a_grown_corpus_moves_no_text_between_splits(corpus, tmp_path):
    lines = corpus.read_text().splitlines()
    (tmp_path / "more.txt").write_text("\n".join([f"new = {i}" for i in range(500)] + lines[::-1]))
    small = shards.build(corpus, tmp_path / "small", **OPTIONS, seed=0)
    grown = shards.build(tmp_path / "more.txt", tmp_path / "grown", **OPTIONS, seed=1)
    for split in ("train", "valid"):
        assert set(everything(small, split)) <= set(everything(grown, split))


def test_what_is_dropped_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("a\na\n\n  \nb </s>\nlong" + "g" * 60 + "\nc\n")
    index = shards.build(tmp_path / "a.txt", tmp_path / "d", **OPTIONS | {"valid_fraction": 0})
    assert sorted(everything(index, "train")) == ["a", "c"]
    assert index.texts_read == 7
    assert index.dropped == {"empty": 2, "duplicate": 1, "special token": 1, "too long": 1}
    with pytest.raises(UserError, match="no split 'valid'"):
        index.sequences("valid")


def test_duplicates_stay_when_asked(tmp_path):
    (tmp_path / "a.txt").write_text("a\na\nb\n")
    options = OPTIONS | {"valid_fraction": 0, "dedupe": False}
    index = shards.build(tmp_path / "a.txt", tmp_path / "d", **options)
    assert sorted(everything(index, "train")) == ["a", "a", "b"]


def test_truncated_sequences_keep_their_end_token(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef\nabc\n")
    options = OPTIONS | {"valid_fraction": 0, "max_length": 5, "overflow": "truncate"}
    index = shards.build(tmp_path / "a.txt", tmp_path / "d", **options)
    assert sorted(everything(index, "train")) == ["abc", "abcd"]
    ids, lengths = index.read("train", np.arange(2))
    assert (ids[np.arange(2), lengths - 1] == 1).all()
    assert index.overlong == 1


def test_a_failed_build_leaves_nothing(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    with pytest.raises(UserError, match="no space left"):
        shards.build(corpus, tmp_path / "d", **OPTIONS)
    assert os.listdir(tmp_path) == []


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "long.txt").write_text("x" * 99)
    for name, options, message in [
        ("nothing.txt", {}, "does not exist"),
        ("empty.txt", {}, "no text to train on"),
        ("long.txt", {}, "1 too long"),
        ("long.txt", {"max_length": 1}, "max_length"),
        ("long.txt", {"valid_fraction": 1.0}, "valid_fraction"),
        ("long.txt", {"block_size": 100}, "multiple of 16"),
        ("long.txt", {"overflow": "split"}, "overflow"),
        ("long.txt", {"tokenizer": "train:many"}, "train:N"),
        ("long.txt", {"format": "jsonl"}, "--column"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            shards.build(tmp_path / name, tmp_path / "out", **OPTIONS | options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_reading_outside_a_split_is_an_error(dataset):
    index = shards.open_index(dataset)
    for number in (-1, index.sequences("valid")):
        with pytest.raises(IndexError):
            index.read("valid", np.array([number]))


def test_gather_ragged_equals_a_loop():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 99, 500)
    starts, lengths = rng.integers(0, 400, 50), rng.integers(1, 90, 50)
    loop = np.concatenate([tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)])
    assert gather_ragged(tokens, starts, lengths).tolist() == loop.tolist()
