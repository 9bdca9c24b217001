"""Copies of a URL's files in the node's cache."""

import errno
import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import shards
from shards.storage.cache import Cache, Copies
from t5vae.common.errors import DamageError
from tests.weather import without_locks

pytestmark = pytest.mark.usefixtures("node")


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
        for made in [pool.submit(make) for _ in range(3)]:
            made.result()
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
    Copies(Cache(node), "version").make("a.tar", digest, lambda: Slow(meet))
    assert {path.name for path in folder.iterdir()} >= {"a.tar", "a.tar.new.part"}
    assert not (folder / "a.tar.old.part").exists()
