import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset

import shards
from shards.format.tokenizers import fingerprint
from shards.write.pack import blocks
from t5vae.common.errors import UserError

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


def test_same_input_and_options_give_the_same_bytes(corpus, dataset, tmp_path, digests):
    options = {"tokenizer": "train:300", "max_length": 24, "valid_fraction": 0.1}
    shards.build(corpus, tmp_path / "b", **options, block_size=32, shard_size=8192)
    assert digests(tmp_path / "b") == digests(dataset)


@pytest.mark.parametrize("overflow", ["drop", "truncate", "split"])
def test_the_way_through_the_disk_does_not_show(
    parts, tmp_path, request, monkeypatch, digests, overflow
):
    options = OPTIONS | {"tokenizer": "train:300", "max_length": 12, "overflow": overflow}
    whole = shards.build(parts, tmp_path / "whole", **options)
    assert whole.dropped["duplicate"] == 1000
    request.getfixturevalue("small_parts")
    written = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (written.append(names[1]), replace(*names)))
    shards.build(parts, tmp_path / "parts", **options)
    assert len([path for path in written if path.suffix == ".rows"]) >= 40
    assert len([path for path in written if path.suffix == ".npz"]) > 20
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    assert sorted(os.listdir(tmp_path)) == ["parts", "whole"]


def test_workers_do_not_show(parts, tmp_path, small_parts, digests):
    options = OPTIONS | {"tokenizer": "train:300", "max_length": 12, "overflow": "split"}
    for workers in (1, 2):
        shards.build(parts, tmp_path / f"{workers}", **options, workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


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


def test_what_equals_another_only_by_its_hash_is_kept(parts, tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr("xxhash.xxh3_64_intdigest", lambda content: len(content) << 56)
    index = shards.build(parts, tmp_path / "d", **OPTIONS)
    lines = [line for path in parts.iterdir() for line in path.read_text().splitlines()]
    assert sorted(everything(index, "train") + everything(index, "valid")) == sorted({*lines})
    assert index.dropped == {"duplicate": 1000}


def test_duplicates_stay_when_asked(tmp_path, parts):
    (tmp_path / "a.txt").write_text("a\na\nb\n")
    options = OPTIONS | {"valid_fraction": 0, "dedupe": False}
    index = shards.build(tmp_path / "a.txt", tmp_path / "d", **options)
    assert sorted(everything(index, "train")) == ["a", "a", "b"]
    train = everything(shards.build(parts, tmp_path / "e", **options), "train")
    assert len(train) == 2000
    assert sum(a == b for a, b in pairwise(train)) < 20  # not side by side


def test_truncated_sequences_are_in_one_split_only(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("abcdef\nabc\nabcdxyz\n")
    options = OPTIONS | {"valid_fraction": 0, "max_length": 5, "overflow": "truncate"}
    index = shards.build(tmp_path / "a.txt", tmp_path / "d", **options)
    assert sorted(everything(index, "train")) == ["abc", "abcd"]
    ids, lengths = index.read("train", np.arange(2))
    assert (ids[np.arange(2), lengths - 1] == 1).all()
    assert index.overlong == 2
    assert index.unique_lengths == [0, 0, 0, 0, 1, 0, 0, 1, 1]
    assert index.dropped == {"duplicate once cut": 1}

    options = OPTIONS | {"max_length": 10, "overflow": "truncate"}
    index = shards.build(corpus, tmp_path / "e", **options)
    train, valid = everything(index, "train"), everything(index, "valid")
    assert set(train) | set(valid) == {line[:9] for line in corpus.read_text().splitlines()}
    assert not set(train) & set(valid)
    assert index.overlong == 1000 == len(train) + len(valid) + sum(index.dropped.values())


def test_split_sequences_make_up_the_text(tmp_path):
    text = "".join(f"{i:03}" for i in range(100))
    (tmp_path / "a.txt").write_text(f"{text}\nshort\n")
    options = OPTIONS | {"valid_fraction": 0, "max_length": 13, "overflow": "split"}
    index = shards.build(tmp_path / "a.txt", tmp_path / "d", **options)
    pieces = sorted(everything(index, "train"))
    assert "".join(pieces[:-1]) == text
    assert pieces[-1] == "short"
    assert (index.overlong, len(pieces), index.texts_read) == (1, 26, 2)


def test_standard_input_is_a_corpus(corpus, tmp_path, monkeypatch, capsys):
    def pipe(content):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    pipe(corpus.read_bytes())
    index = shards.build("-", tmp_path / "piped", **OPTIONS)
    named = shards.build(corpus, tmp_path / "named", **OPTIONS)
    assert index.shards == named.shards
    assert index.recipe == named.recipe | {"source": "-"}
    pipe(corpus.read_bytes())
    shards.build("-", tmp_path / "piped", **OPTIONS)
    assert "already built" in capsys.readouterr().err
    with pytest.raises(UserError, match="no name that tells its format: give --format"):
        shards.build("-", tmp_path / "other", column="t", **OPTIONS)
    pipe(b"another = 1\n")
    with pytest.raises(UserError, match="another input"):
        shards.build("-", tmp_path / "piped", **OPTIONS)


def _write_and_close(descriptor, content):
    with open(descriptor, "wb") as file:
        file.write(content)


def test_a_pipe_is_a_corpus(corpus, tmp_path):
    named = shards.build(corpus, tmp_path / "named", **OPTIONS)
    os.mkfifo(tmp_path / "fifo")
    with ThreadPoolExecutor() as writer:
        writer.submit((tmp_path / "fifo").write_bytes, corpus.read_bytes())
        assert shards.build(tmp_path / "fifo", tmp_path / "a", **OPTIONS).shards == named.shards
    ours, theirs = os.pipe()
    with ThreadPoolExecutor() as writer:
        writer.submit(_write_and_close, theirs, corpus.read_bytes())
        index = shards.build(f"/dev/fd/{ours}", tmp_path / "b", workers=2, **OPTIONS)
    os.close(ours)
    assert index.shards == named.shards
    assert index.recipe == named.recipe | {"source": "-"}


def test_webdataset_texts_are_a_corpus_like_any(corpus, tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, line in enumerate(corpus.read_text().splitlines()):
            writer.write({"__key__": f"{number:05}", "txt": line})
    texts = shards.build(tmp_path / "a.tar", tmp_path / "tar", **OPTIONS, format="webdataset")
    lines = shards.build(corpus, tmp_path / "lines", **OPTIONS)
    assert texts.shards == lines.shards


@pytest.mark.parametrize("overflow", ["drop", "truncate", "split"])
def test_webdataset_token_ids_are_a_corpus(tmp_path, overflow):
    rows = [np.arange(10, 10 + length) for length in (3, 4, 7, 3)]
    rows.append(np.array([10, 11, 12, 1, 0, 0]))  # the first once more, with an end and pads
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, row in enumerate(rows):
            writer.write({"__key__": f"{number:05}", "ids.npy": row})
    options = {"format": "webdataset", "tokenizer": "byte", "max_length": 5, "valid_fraction": 0}
    index = shards.build(tmp_path / "a.tar", tmp_path / "d", **options, overflow=overflow)
    ids, lengths = index.read("train", np.arange(index.sequences("train")))
    kept = sorted(row[: n - 1].tolist() for row, n in zip(ids, lengths, strict=True))
    more = {"drop": [], "truncate": [], "split": [[14, 15, 16]]}[overflow]
    assert kept == [[10, 11, 12], [10, 11, 12, 13], *more]
    assert (ids[np.arange(len(ids)), lengths - 1] == 1).all()
    assert index.overlong == 1
    assert index.dropped["duplicate"] == 2
    with pytest.raises(UserError, match="token ids"):
        shards.build(tmp_path / "a.tar", tmp_path / "e", **options | {"tokenizer": "train:300"})


def test_a_url_is_no_place_to_build_in(corpus):
    with pytest.raises(UserError, match="s3://bucket/d is no folder of this machine"):
        shards.build(corpus, "s3://bucket/d", **OPTIONS)


def test_long_sequences_make_smaller_blocks(tmp_path):
    (tmp_path / "short.txt").write_text("\n".join(f"{i:04}" for i in range(5000)))
    (tmp_path / "long.txt").write_text("\n".join(f"{i:04}" * 250 for i in range(700)))
    options = {"tokenizer": "byte", "max_length": 1001, "valid_fraction": 0}
    short = shards.build(tmp_path / "short.txt", tmp_path / "s", **options)
    long = shards.build(tmp_path / "long.txt", tmp_path / "l", **options)
    assert (short.block_size, short.blocks["sequences"].max()) == (4096, 4096)
    assert (long.block_size, long.blocks["sequences"].max()) == (256, 256)  # of 2^18 / 1001
    assert shards.verify(tmp_path / "l").ok


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
        ("long.txt", {"overflow": "wrap"}, "overflow"),
        ("long.txt", {"tokenizer": "train:many"}, "train:N"),
        ("long.txt", {"format": "jsonl"}, "--column"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            shards.build(tmp_path / name, tmp_path / "out", **OPTIONS | options)
        assert "\n" not in str(error.value)
        assert sorted(os.listdir(tmp_path)) == ["empty.txt", "long.txt"]


def test_reading_outside_a_split_is_an_error(dataset):
    index = shards.open_index(dataset)
    for number in (-1, index.sequences("valid")):
        with pytest.raises(IndexError):
            index.read("valid", np.array([number]))


def test_blocks_are_cut_across_parts():
    rng = np.random.default_rng(0)
    parts = []
    for sequences in (3, 0, 40, 1, 7, 16):
        lengths = rng.integers(1, 9, sequences).astype(np.uint16)
        parts.append((lengths, rng.integers(0, 99, lengths.sum()).astype(np.uint32)))
    cut = list(blocks(parts, 16))
    assert [len(lengths) for lengths, _ in cut] == [16, 16, 16, 16, 3]
    assert all(len(tokens) == lengths.sum() for lengths, tokens in cut)
    for which in (0, 1):
        joined = np.concatenate([part[which] for part in parts])
        assert np.concatenate([block[which] for block in cut]).tolist() == joined.tolist()
