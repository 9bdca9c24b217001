"""Copies of a URL's files in the node's cache."""

import errno
import fcntl
import gc
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import shards
from shards.storage import cache
from shards.storage.cache import Cache, Copies
from t5vae.common.errors import DamageError, StorageError
from tests.shards.site import everything
from tests.weather import without_locks

pytestmark = pytest.mark.usefixtures("node")


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def copies(node: Path) -> list[str]:
    return sorted(path.name for path in node.rglob("*.tar"))


def names(dataset, split="") -> list[str]:
    return sorted(path.name for path in Path(dataset).glob(f"{split}*.tar"))


def threads() -> list[threading.Thread]:
    gc.collect()  # the stores of earlier tests, too
    return [thread for thread in threading.enumerate() if thread.name == "shards-cache"]


def test_a_cold_start_reads_ranges_and_later_only_copies(site, dataset, node):
    whole = everything(shards.open_index(dataset))
    index = shards.open_index(site.url)
    assert everything(index) == whole
    assert site.count("part").keys() == set(names(dataset, "train"))
    until(lambda: copies(node) == names(dataset, "train"))
    assert set(site.count("whole").values()) == {1}
    for name in copies(node):
        assert (node / index.sha256 / name).read_bytes() == (dataset / name).read_bytes()
    site.asked.clear()
    assert everything(index) == whole
    assert site.asked == []
    assert everything(shards.open_index(site.url)) == whole
    assert site.asked == [("index.json", "whole")]


def test_an_opened_dataset_needs_no_server_once_it_is_copied(site, dataset, node, monkeypatch):
    monkeypatch.setattr("t5vae.common.storage._patience", 0.3)
    index = shards.open_index(site.url)
    texts = index.texts("train", np.arange(index.sequences("train")))
    until(lambda: copies(node) == names(dataset, "train"))
    site.gone.set()
    assert index.texts("train", np.arange(len(texts))) == texts
    with pytest.raises(StorageError, match=r"http://.*/index\.json: .*disconnected"):
        shards.open_index(site.url)


def test_a_copy_that_rots_is_read_again_from_the_url(site, dataset, node):
    index = shards.open_index(site.url)
    whole = everything(index)
    until(lambda: copies(node) == names(dataset, "train"))
    copy = node / index.sha256 / "train-00001.tar"
    content = bytearray(copy.read_bytes())
    first = index.blocks[index.blocks["shard"] == 1][0]
    content[first["tokens_offset"]] ^= 1
    copy.write_bytes(content)
    assert everything(index) == whole
    assert not copy.exists()


def test_processes_of_a_node_copy_each_shard_once(site, dataset, node):
    code = (
        "import shards, sys, numpy, time, pathlib;"
        f"index = shards.open_index({site.url!r});"
        "index.read('train', numpy.arange(index.sequences('train')));"
        f"folder = pathlib.Path({str(node)!r});"
        f"[time.sleep(0.01) for _ in iter(lambda: len([*folder.rglob('*.tar')]), "
        f"{len(names(dataset, 'train'))})]"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert site.count("whole") == dict.fromkeys(names(dataset, "train"), 1)
    assert not [*node.rglob("*.part")]


def test_a_transfer_that_changed_a_bit_is_done_again(site, dataset, node, capsys):
    once, twice = "train-00000.tar", "train-00001.tar"
    site.faults = {(once, "whole"): ["flip"], (twice, "whole"): ["flip", "flip"]}
    index = shards.open_index(site.url)
    assert everything(index) == everything(shards.open_index(dataset))
    until(lambda: copies(node) == sorted({*names(dataset, "train")} - {twice}))
    assert site.count("whole")[once] == site.count("whole")[twice] == 2
    assert (node / index.sha256 / once).read_bytes() == (dataset / once).read_bytes()
    assert f"{site.url}/{twice} is not what index.json names" in capsys.readouterr().err
    assert everything(index) == everything(shards.open_index(dataset))


def test_blocks_npy_is_verified(site, dataset, node):
    whole = shards.open_index(dataset).blocks.tolist()
    site.faults = {("blocks.npy", "whole"): ["flip"]}
    index = shards.open_index(site.url)
    assert index.blocks.tolist() == whole
    copy = node / index.sha256 / "blocks.npy"
    copy.write_bytes(b"rotten")
    assert shards.open_index(site.url).blocks.tolist() == whole
    assert copy.read_bytes() == (dataset / "blocks.npy").read_bytes()
    copy.unlink()
    site.faults = {("blocks.npy", "whole"): ["flip", "flip"]}
    with pytest.raises(DamageError, match=r"/blocks\.npy is not what index\.json names"):
        _ = shards.open_index(site.url).blocks


def test_the_least_recently_used_files_of_other_datasets_make_room(site, dataset, node):
    sizes = {name: (dataset / name).stat().st_size for name in names(dataset, "train")}
    room = sum(sizes.values()) + (dataset / "blocks.npy").stat().st_size
    for age, name in enumerate(["new", "old"]):
        other = node / ("0" * 64) / f"{name}.tar"
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(bytes(100))
        os.utime(other, (10**9 - age, 10**9 - age))
    index = shards.open_index(site.url, Cache(node, room + 100))
    everything(index)
    until(lambda: copies(node) == sorted([*sizes, "new.tar"]))


def test_a_full_cache_is_said_once_and_the_rest_read_by_ranges(site, dataset, node, capsys):
    limit = sum((dataset / name).stat().st_size for name in ("blocks.npy", "train-00000.tar"))
    index = shards.open_index(site.url, Cache(node, limit))
    whole = everything(shards.open_index(dataset))
    assert everything(index) == whole
    until(lambda: not threads())
    assert len(copies(node)) <= 1
    assert everything(index) == whole
    assert capsys.readouterr().err.count(f"the cache {node} is full") == 1
    assert sum(path.stat().st_size for path in node.rglob("*") if path.is_file()) <= limit


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("os.fsync", errno.ENOSPC),
        ("os.fsync", errno.EIO),
        ("os.truncate", errno.EIO),
        ("fcntl.flock", errno.ESTALE),
    ],
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
    until(lambda: not threads())
    assert capsys.readouterr().err.count(f"cache {node}: {os.strerror(number)}") == 1
    assert not copies(node)
    assert not [*node.rglob("*.part")]


def test_a_process_killed_while_copying_hinders_none(site, dataset, node):
    name = "train-00000.tar"
    site.faults = {(name, "whole"): [site.gone]}
    code = (
        f"import shards, numpy, time; index = shards.open_index({site.url!r});"
        "index.read('train', numpy.arange(9)); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: [*node.rglob(f"{name}.part")] and site.count("whole")[name])
    process.kill()
    process.wait()
    assert [*node.rglob(f"{name}.part")]
    index = shards.open_index(site.url)
    everything(index)
    until(lambda: copies(node) == names(dataset, "train"))
    assert not [*node.rglob("*.part")]


def test_copying_keeps_no_process_from_exiting(site):
    site.faults = {(name, "whole"): [site.gone] for name in names(site.folder)}
    code = (
        f"import shards, numpy; index = shards.open_index({site.url!r});"
        "index.read('train', numpy.arange(9))"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_and_dropped_stores_end_their_threads(site, node):
    site.faults = {(name, "whole"): [None, 500, 500] for name in names(site.folder)}
    before = len(threads())
    closed, dropped = shards.open_index(site.url), shards.open_index(site.url)
    for index in (closed, dropped):
        everything(index)
    closed.store.close()
    del dropped, index
    until(lambda: len(threads()) <= before)
    shutil.rmtree(node)
    assert everything(closed)
    until(threads)
    closed.store.close()


def test_a_closed_store_does_not_finish_its_copy(site, node, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 1000)
    name, go_on = "train-00000.tar", threading.Event()
    site.faults = {(name, "part"): [None, None, None, go_on]}  # a block, its size, two chunks
    index = shards.open_index(site.url)
    index.read("train", np.arange(1))
    until(lambda: site.count("part")[name] == 4)
    index.store.close()
    go_on.set()
    until(lambda: not threads())
    assert not copies(node)
    assert not [*node.rglob("*.part")]


def test_a_file_that_another_process_copied_meanwhile_is_not_copied_again(node):
    copies = Copies(Cache(node), "version")
    copies.folder.mkdir(parents=True)
    make = partial(copies.make, "blocks.npy", sha256="", source=None)
    with open(copies.folder / "blocks.npy.lock", "wb") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert make(wait=False) is False
        waiting = pool.submit(make)
        time.sleep(0.05)
        (copies.folder / "blocks.npy").write_bytes(b"whole")
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result() is True


def test_without_locks_processes_copy_shards_that_are_whole(site, dataset, node):
    code = (
        "import fcntl, shards, sys, numpy, time, pathlib;"
        "fcntl.flock = lambda *_: (_ for _ in ()).throw(OSError(38, 'Function not implemented'));"
        f"index = shards.open_index({site.url!r});"
        "index.read('train', numpy.arange(index.sequences('train')));"
        f"folder = pathlib.Path({str(node)!r});"
        f"[time.sleep(0.01) for _ in iter(lambda: len([*folder.rglob('*.tar')]), "
        f"{len(names(dataset, 'train'))})]; index.store.close()"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    version = shards.open_index(dataset).sha256
    for name in names(dataset, "train"):
        assert (node / version / name).read_bytes() == (dataset / name).read_bytes()


class Slow:
    """A remote file that waits for others before its second half."""

    url, size = "slow", 20_000

    def __init__(self, meet: threading.Barrier):
        self.halves = [b"a" * 10_000, b"b" * 10_000]
        self.meet = meet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, size):
        self.meet.wait(20)
        return self.halves.pop(0) if self.halves else b""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_half_files_of_several_never_mix(node, monkeypatch, number):
    without_locks(monkeypatch, number)
    whole = b"a" * 10_000 + b"b" * 10_000
    meet = threading.Barrier(3)
    make = partial(
        Copies(Cache(node), "version").make,
        "a.tar",
        hashlib.sha256(whole).hexdigest(),
        lambda: Slow(meet),
    )
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(make, wait=wait) for wait in (True, True, False)]
        assert [each.result() for each in made] == [True] * 3
    assert (node / "version" / "a.tar").read_bytes() == whole
    assert not [*node.rglob("*.part")]


def test_without_locks_folders_are_made_by_several_at_once(node, monkeypatch):
    without_locks(monkeypatch)
    meet = threading.Barrier(3)
    contents = {"vocab.txt": b"a b", "tokenizer.json": b"{}"}

    def fetch():
        meet.wait(20)
        return contents

    with ThreadPoolExecutor() as pool:
        copies = Copies(Cache(node), "version")
        made = [pool.submit(copies.make_folder, "tokenizer", fetch) for _ in range(3)]
        folders = {each.result() for each in made}
    assert folders == {node / "version" / "tokenizer"}
    assert {p.name: p.read_bytes() for p in folders.pop().iterdir()} == contents
    assert not [*node.rglob("*.part")]


def test_without_locks_what_killed_processes_left_goes_after_an_hour(node, monkeypatch):
    without_locks(monkeypatch)
    folder = node / "version"
    folder.mkdir(parents=True)
    for name, age in (("old", 4000), ("new", 1000)):
        (folder / f"a.tar.{name}.part").write_bytes(b"half")
        os.utime(folder / f"a.tar.{name}.part", (time.time() - age,) * 2)
    meet = threading.Barrier(1)
    digest = hashlib.sha256(b"a" * 10_000 + b"b" * 10_000).hexdigest()
    assert Copies(Cache(node), "version").make("a.tar", digest, lambda: Slow(meet))
    assert {path.name for path in folder.iterdir()} >= {"a.tar", "a.tar.new.part"}
    assert not (folder / "a.tar.old.part").exists()
