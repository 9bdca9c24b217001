"""What a build opens, and reads again, as a corpus grows."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import shards
from shards.write import merge as merging
from shards.write.merge import merge
from shards.write.spool import SpoolWriter, open_spool

OPTIONS = {"tokenizer": "byte", "max_length": 80, "valid_fraction": 0.1, "block_size": 32}
watched: list[str] = []


def _watch(event, arguments):
    if event == "open":
        watched.append(str(arguments[0]))


sys.addaudithook(_watch)


def spool_of(folder, runs, dedupe=True):
    """Runs of 20 texts, of which 10 are in the one before too."""
    folder.mkdir()
    writer = SpoolWriter(folder, 0, "text", 0, dedupe)
    for number in range(runs):
        writer.add([f"text {item}" for item in range(10 * number, 10 * number + 20)])
        writer.flush()
    return open_spool(folder, [writer.counts], "text", dedupe)


def everything(spool):
    found = [spool.bucket(number) for number in range(spool.buckets)]
    items = [item for bucket in found for item in bucket.items.to_pylist()]
    return items, np.concatenate([bucket.hashes for bucket in found]).tolist()


@pytest.mark.parametrize("dedupe", [True, False])
@pytest.mark.parametrize("runs", [1, 4, 5, 70])
def test_merged_runs_hold_what_all_runs_hold(tmp_path, monkeypatch, runs, dedupe):
    monkeypatch.setattr(merging, "MOST_RUNS", 4)
    monkeypatch.setattr("shards.write.spool.BUCKET_BYTES", 500)
    spool = spool_of(tmp_path / "read", runs, dedupe)
    before = everything(spool)
    merged, duplicates = merge(spool, tmp_path / "read", workers=1)
    assert len(merged.runs) <= 4
    assert everything(merged) == before
    assert spool.items - duplicates == merged.items >= len(before[0])
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".rows", ".items")]
    assert len(files) == 2 * len(merged.runs)


def test_how_many_files_are_opened(tmp_path, monkeypatch):
    """Each run by one merge of each level, and then a few a bucket: never runs times buckets."""
    monkeypatch.setattr(merging, "MOST_RUNS", 8)
    opened, most = {}, 0
    real = merging.Run.read

    def read(run, *places):
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))
        return real(run, *places)

    monkeypatch.setattr(merging.Run, "read", read)
    for runs in (64, 512):
        spool = spool_of(tmp_path / str(runs), runs)
        watched.clear()
        here = len(os.listdir("/proc/self/fd"))
        merged, _ = merge(spool, tmp_path / str(runs), workers=1)
        for number in range(merged.buckets):
            merged.bucket(number)
        opened[runs] = len([path for path in watched if path.endswith((".rows", ".items"))])
        assert most - here <= 2 * 8 + 4
        assert 2 * runs <= opened[runs] < 2.5 * runs + 2 * 8 * merged.buckets
    maps = Path("/proc/self/maps").read_text()
    assert ".items" not in maps
    assert ".rows" not in maps


def test_merging_does_not_show(parts, tmp_path, digests, small_parts, monkeypatch):
    for overflow in ("drop", "split"):
        options = OPTIONS | {"overflow": overflow, "max_length": 30}
        shards.build(parts, tmp_path / f"{overflow}-read", **options)
        with monkeypatch.context() as later:
            later.setattr(merging, "MOST_RUNS", 3)
            shards.build(parts, tmp_path / f"{overflow}-merged", **options)
        assert digests(tmp_path / f"{overflow}-read") == digests(tmp_path / f"{overflow}-merged")


def opened_again(source, out, **options):
    watched.clear()
    shards.build(source, out, **OPTIONS | options)
    return [path for path in watched if str(source) in path]


def test_an_unchanged_source_is_not_read_again(parts, tmp_path, digests, capsys):
    source, out = tmp_path / "source", tmp_path / "d"
    source.mkdir()
    for path in sorted(parts.iterdir())[:3]:
        (source / path.name).write_bytes(path.read_bytes())
    assert len(opened_again(source, out)) == 3
    index = (out / "index.json").read_bytes()
    assert opened_again(source, out) == []
    os.utime(source / "00.txt", (1, 1))  # the same bytes
    assert len(opened_again(source, out)) == 3
    assert opened_again(source, out) == []
    assert (out / "index.json").read_bytes() == index

    (out / ".source").unlink()  # as a dataset of an older version
    assert len(opened_again(source, out)) == 3
    assert opened_again(source, out) == []
    assert capsys.readouterr().err.count("already built") == 5
    assert str(tmp_path) not in (out / ".source").read_text()

    content = (source / "00.txt").read_bytes()
    (source / "00.txt").write_bytes(content[::-1])
    with pytest.raises(shards.UserError, match="another input"):
        opened_again(source, out)


def test_a_stamp_of_another_dataset_says_nothing(corpus, tmp_path):
    opened_again(corpus, tmp_path / "a")
    opened_again(corpus, tmp_path / "b", seed=1)
    (tmp_path / "b/.source").write_bytes((tmp_path / "a/.source").read_bytes())
    assert len(opened_again(corpus, tmp_path / "b", seed=1)) == 1
    (tmp_path / "b/.source").write_bytes(b"\xff\0")
    assert len(opened_again(corpus, tmp_path / "b", seed=1)) == 1


@pytest.mark.parametrize("told", [True, False])
def test_an_unchanged_url_is_read_again_only_if_nothing_tells(corpus, tmp_path, monkeypatch, told):
    if not told:
        monkeypatch.setattr("shards.write.corpora.VERSIONS", ())
    url = f"file://{corpus}"
    shards.build(url, tmp_path / "d", **OPTIONS)
    assert (tmp_path / "d/.source").exists() == told
    watched.clear()
    shards.build(url, tmp_path / "d", **OPTIONS)
    assert (str(corpus) in watched) == (not told)
