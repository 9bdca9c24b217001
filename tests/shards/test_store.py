import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

import shards
from shards.storage.kinds import KINDS, open_store
from shards.storage.local import OPEN_FILES, LocalStore

FILES = 2 * OPEN_FILES


@pytest.fixture
def store(tmp_path):
    for number in range(FILES):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 9)
    store = open_store(str(tmp_path))
    assert isinstance(store, LocalStore)
    return store


def files_open_in(folder) -> int:
    return sum(file.path.startswith(str(folder)) for file in psutil.Process().open_files())


def test_ranges_end_with_the_file(store):
    assert store.read("3", 0, 4) == b"\3" * 4
    assert store.read("3", 7, 4) == b"\3" * 2
    assert store.read("3", 9, 4) == b""
    with pytest.raises(FileNotFoundError):
        store.read("none", 0, 4)


@pytest.mark.parametrize("most", [1, 4, 7])
def test_a_range_that_comes_piece_by_piece_is_whole(tmp_path, monkeypatch, most):
    content = bytes(range(100))
    (tmp_path / "file").write_bytes(content)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, most), at))
    store = LocalStore(tmp_path)
    for begin, size in [(0, 100), (13, 41), (90, 50), (100, 5), (3, 0)]:
        assert store.read("file", begin, size) == content[begin : begin + size]


def test_few_files_are_held_open_and_none_after_close(store, tmp_path):
    for number in range(FILES):
        store.read(f"{number}", 0, 1)
    assert files_open_in(tmp_path) == OPEN_FILES
    store.close()
    assert files_open_in(tmp_path) == 0
    assert store.read("5", 0, 1) == b"\5"


def test_threads_may_read_at_once(store):
    def read(turn: int) -> bool:
        number = turn * 31 % FILES
        return store.read(f"{number}", turn % 5, 4) == bytes([number]) * 4

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(4000)))


def test_a_replaced_file_is_read_on_as_it_was(store, tmp_path):
    assert store.read("1", 0, 1) == b"\1"
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").rename(tmp_path / "1")
    assert store.read("1", 1, 1) == b"\1"
    store.close()
    assert store.read("1", 1, 1) == b"e"


def test_another_kind_is_a_line_in_the_table(dataset, monkeypatch):
    asked = []

    def shelf(location, manifest, cache):
        asked.append((location, manifest.version))
        return LocalStore(location.removeprefix("shelf://"))

    monkeypatch.setitem(KINDS, "shelf", shelf)
    index, local = shards.open_index(f"shelf://{dataset}"), shards.open_index(dataset)
    assert index.texts("train", np.arange(5)) == local.texts("train", np.arange(5))
    assert asked == [(f"shelf://{dataset}", ""), (f"shelf://{dataset}", local.sha256)]
