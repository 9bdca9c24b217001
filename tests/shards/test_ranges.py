"""Ranges of a URL's shards that a node keeps."""

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import shards
from shards.storage.cache import Cache, Copies
from shards.storage.ranges import RangeCache
from t5vae.common.errors import DamageError, StorageError
from tests.shards.site import everything
from tests.weather import without_locks

pytestmark = pytest.mark.usefixtures("node")

READ = (
    "import shards, numpy; index = shards.open_index({url!r});"
    "index.read('train', numpy.arange(index.sequences('train')));"
)


def names(dataset) -> list[str]:
    return sorted(path.name for path in Path(dataset).glob("train*.tar"))


def kept(node: Path) -> int:
    """Bytes of the ranges that a node keeps, as the disk counts them."""
    return sum(path.stat().st_blocks * 512 for path in node.rglob("*.tar"))


@pytest.fixture
def ranges(node) -> RangeCache:
    return RangeCache(Copies(Cache(node), "0" * 64), "s3://bucket/data")


def test_each_block_is_asked_for_once(site, dataset, node):
    whole = everything(shards.open_index(dataset))
    index = shards.open_index(site.url)
    assert everything(index) == whole
    blocks = np.bincount(index.split_blocks("train")["shard"])
    assert [site.count("part")[name] for name in names(dataset)] == blocks[blocks > 0].tolist()
    assert not site.count("whole")
    site.asked.clear()
    assert everything(index) == whole
    assert site.asked == []
    assert everything(shards.open_index(site.url)) == whole
    assert site.asked == [("index.json", "whole")]


def test_a_part_of_a_shard_costs_that_part(site, node):
    index = shards.open_index(site.url)
    index.read("train", np.arange(1))
    assert site.count("part").total() == 1
    (copy,) = node.rglob("*.tar")
    block = index.blocks[0]
    assert copy.stat().st_size == block["tokens_offset"] + block["tokens"] * 2


def test_an_opened_dataset_needs_no_server_for_what_was_read(site, node, monkeypatch):
    monkeypatch.setattr("t5vae.common.storage._patience", 0.3)
    index = shards.open_index(site.url)
    texts = index.texts("train", np.arange(index.sequences("train")))
    site.gone.set()
    assert index.texts("train", np.arange(len(texts))) == texts
    with pytest.raises(StorageError, match=r"http://.*/index\.json: .*disconnected"):
        shards.open_index(site.url)


def test_the_index_is_asked_for_once_a_node_where_the_server_tells_of_changes(site, dataset):
    site.tells_changes = True
    for _ in range(3):
        assert shards.open_index(site.url).sha256 == shards.open_index(dataset).sha256
    assert site.asked.count(("index.json", "whole")) == 1
    path = site.folder / "index.json"
    path.write_text(path.read_text() + "\n")
    assert shards.open_index(site.url).sha256 != shards.open_index(dataset).sha256
    assert site.asked.count(("index.json", "whole")) == 2


@pytest.mark.parametrize("what", ["bits", "all"])
def test_a_copy_that_rots_is_read_again_from_the_url(site, node, what):
    index = shards.open_index(site.url)
    whole = everything(index)
    copy = node / index.sha256 / "train-00001.tar"
    content = bytearray(copy.read_bytes())
    first = index.blocks[index.blocks["shard"] == 1][0]
    content[first["tokens_offset"]] ^= 1
    copy.write_bytes(content if what == "bits" else b"")
    assert everything(index) == whole
    assert everything(index) == whole
    assert copy.read_bytes()[first["tokens_offset"]] == content[first["tokens_offset"]] ^ 1


def test_a_transfer_that_changed_a_bit_is_done_again(site, dataset):
    name = "train-00000.tar"
    site.faults = {(name, "part"): ["flip"]}
    index = shards.open_index(site.url)
    assert everything(index) == everything(shards.open_index(dataset))
    site.faults = {("train-00001.tar", "part"): ["flip"] * 2}
    (index.store._copies.folder / "train-00001.tar").unlink()
    with pytest.raises(DamageError, match=r"train-00001\.tar, block 0 is damaged"):
        everything(index)


def test_processes_of_a_node_ask_for_each_block_once(site, dataset, node):
    code = READ.format(url=site.url)
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0] * 3
    index = shards.open_index(dataset)
    assert site.count("part").total() == len(index.split_blocks("train"))


def test_threads_ask_for_a_range_once(ranges):
    asked = []

    def fetch():
        asked.append(1)
        return b"abc"

    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(ranges.read, "a.tar", 700, 3, fetch) for _ in range(8)]
        assert {read.result() for read in reads} == {b"abc"}
    assert len(asked) == 1


def test_another_range_that_begins_in_the_same_place_is_another(ranges):
    assert ranges.read("a.tar", 700, 3, lambda: b"abc") == b"abc"
    assert ranges.read("a.tar", 700, 4, lambda: b"abcd") == b"abcd"
    assert ranges.read("a.tar", 701, 3, lambda: b"bcd") == b"bcd"
    assert ranges.read("b.tar", 701, 3, lambda: b"xyz") == b"xyz"


def test_a_range_that_cannot_be_fetched_is_asked_for_again(ranges):
    def fail():
        raise OSError(errno.EIO, "the weather")

    with pytest.raises(OSError, match="weather"):
        ranges.read("a.tar", 0, 3, fail)
    assert ranges.read("a.tar", 0, 3, lambda: b"abc") == b"abc"
    assert ranges.read("a.tar", 0, 3, fail) == b"abc"


def test_a_range_that_was_not_written_whole_before_a_crash_is_forgotten(ranges):
    ranges.read("a.tar", 0, 3, lambda: b"abc")
    copy = ranges._copies.folder / "a.tar"
    copy.write_bytes(b"a")
    assert ranges.read("a.tar", 0, 3, lambda: b"abc") == b"abc"
    assert ranges.forget("a.tar")
    assert not ranges.forget("a.tar")
    assert ranges.read("a.tar", 0, 3, lambda: b"new") == b"new"


def test_a_process_that_is_stopped_while_it_fetches_is_waited_for_a_while(
    site, ranges, node, monkeypatch
):
    monkeypatch.setattr("shards.storage.ranges.TURN", 0.2)
    name = "train-00000.tar"
    site.faults = {(name, "part"): [site.gone]}
    process = subprocess.Popen([sys.executable, "-c", READ.format(url=site.url)])
    try:
        while not site.count("part")[name]:
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        assert everything(shards.open_index(site.url)) == everything(shards.open_index(site.folder))
    finally:
        process.kill()
        process.wait()


def test_without_locks_ranges_are_kept_too(site, dataset, node, monkeypatch):
    without_locks(monkeypatch)
    index = shards.open_index(site.url)
    whole = everything(index)
    assert whole == everything(shards.open_index(dataset))
    site.asked.clear()
    assert everything(index) == whole
    assert site.asked == []


def test_what_other_datasets_used_longest_ago_makes_room(site, dataset, node):
    everything(shards.open_index(site.url))
    room = kept(node) + 2 * 4096 * len([*node.rglob("*.ranges")])
    for copy in [*node.rglob("*.*")]:
        copy.unlink()
    for age, name in enumerate(["new", "old"]):
        other = node / ("0" * 64) / f"{name}.tar"
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(bytes(room))
        os.utime(other, (10**9 - age, 10**9 - age))
    index = shards.open_index(site.url, Cache(node, 2 * room))
    everything(index)
    assert {path.name for path in node.rglob("*.tar")} == {*names(dataset), "new.tar"}


def test_a_full_cache_is_said_once_and_the_rest_read_by_ranges(site, dataset, node, capsys):
    limit = 3 * 4096 + (dataset / "blocks.npy").stat().st_size
    index = shards.open_index(site.url, Cache(node, limit))
    whole = everything(shards.open_index(dataset))
    assert everything(index) == whole
    assert everything(index) == whole
    assert capsys.readouterr().err.count(f"the cache {node} is full") == 1
    assert 0 < kept(node) <= 3 * 4096


@pytest.mark.parametrize(
    ("call", "number"),
    [("os.pwrite", errno.ENOSPC), ("os.pwrite", errno.EIO), ("fcntl.flock", errno.ESTALE)],
)
def test_a_disk_that_is_full_or_fails_is_said_once(
    site, dataset, node, capsys, monkeypatch, call, number
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    index = shards.open_index(site.url)
    assert len(index.blocks)
    monkeypatch.setattr(call, fail)
    for _ in range(2):
        assert everything(index) == everything(shards.open_index(dataset))
    assert capsys.readouterr().err.count(f"cache {node}: {os.strerror(number)}") == 1


def test_the_files_are_counted_seldom(ranges, monkeypatch):
    counted = []
    monkeypatch.setattr("shards.storage.cache._files", lambda _: counted.append(1) or [])
    for number in range(1000):
        ranges.read("a.tar", 512 * number, 100, lambda: bytes(100))
    assert len(counted) == 1


def test_a_closed_store_reads_on(site):
    index = shards.open_index(site.url)
    whole = everything(index)
    index.store.close()
    assert everything(index) == whole
    assert not [thread for thread in threading.enumerate() if thread.name == "shards-cache"]
