import errno
import fcntl
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from typer.testing import CliRunner

import shards
from shards import ShardStream
from shards.cli import app
from shards.storage import cache
from shards.storage.cache import Cache, Copies
from t5vae.common.errors import DamageError, UserError


@dataclass
class Site:
    """A folder on a web server of this machine, and what was asked of it.

    `faults` are taken by requests for a file in order: an HTTP status, "flip" a bit, "cut" the
    answer short, an event to wait for, None for nothing; those under (name, "whole") by requests
    for all of the file only, as copies of small files are made.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    listed: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)  # name, "whole" or "part"
    faults: dict[tuple[str, str], list] = field(default_factory=dict)
    gone: threading.Event = field(default_factory=threading.Event)

    def count(self, what: str) -> Counter:
        return Counter(name for name, how in self.asked if how == what and name.endswith(".tar"))


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            if site.gone.is_set():
                self.close_connection = True
                return None
            name = self.path.lstrip("/")
            path = site.folder / name
            if path.is_dir() and site.listed:
                links = "".join(f'<a href="{file.name}">' for file in path.iterdir())
                return self.answer(200, links.encode(), "text/html")
            if not path.is_file():
                return self.answer(404, b"")
            content, status, how = path.read_bytes(), 200, "whole"
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and site.ranges:
                first, last = map(int, asked.groups())
                how = "whole" if (first, last) == (0, len(content) - 1) else "part"
                content, status = content[first : last + 1], 206
            if self.command == "HEAD":
                return self.answer(status, content)
            site.asked.append((name, how))
            faults = site.faults.get((name, how), [])
            fault = faults.pop(0) if faults else None
            if isinstance(fault, int):
                return self.answer(fault, b"")
            if isinstance(fault, threading.Event):
                fault.wait()
            if fault == "flip":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.answer(status, content, fault=fault)

        def answer(self, status, content, kind="application/octet-stream", fault=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", kind)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault == "cut":
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # clients of these tests go away at will


@pytest.fixture
def site(dataset, tmp_path):
    site = Site(Path(shutil.copytree(dataset, tmp_path / "site")))
    server = Server(("127.0.0.1", 0), handler(site))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield site
    site.gone.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def node(tmp_path, monkeypatch) -> Path:
    """The node's cache."""
    monkeypatch.setenv("T5VAE_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr("shards.storage.requests.PAUSES", (0.01, 0.02))
    return tmp_path / "node"


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


def epoch(path) -> list[list[int]]:
    """The ids of all sequences, in the stream's order."""
    n = shards.open_index(path).sequences("train")
    with ShardStream(path, seed=0, global_batch_size=100) as stream:
        return [ids for batch in islice(stream, n // 100) for ids in batch.ids.tolist()]


def everything(index) -> list[list[int]]:
    return index.read("train", np.arange(index.sequences("train")))[0].tolist()


@pytest.fixture
def s3(monkeypatch):
    """An S3 server of this machine."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield fsspec.filesystem("s3", skip_instance_cache=True)
    server.stop()


@pytest.mark.parametrize("protocol", ["http", "memory", "s3"])
def test_a_url_streams_as_the_folder_does(dataset, node, request, protocol):
    if protocol == "http":
        url = request.getfixturevalue("site").url
    elif protocol == "memory":
        url = "memory://bucket/small"
        fsspec.filesystem("memory").put(str(dataset), "/bucket/small", recursive=True)
    else:
        url = "s3://bucket/small"
        fs = request.getfixturevalue("s3")
        fs.mkdir("bucket")
        fs.put(str(dataset), "bucket/small", recursive=True)
    assert epoch(url) == epoch(dataset)
    remote, local = shards.open_index(url), shards.open_index(dataset)
    assert remote.sha256 == local.sha256
    assert remote.texts("valid", np.arange(5)) == local.texts("valid", np.arange(5))
    report = shards.verify(url)
    assert report.ok, report.problems
    assert report.path == url
    with pytest.raises(UserError, match="no dataset"):
        shards.open_index(f"{url}/nothing")


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


def test_an_opened_dataset_needs_no_server_once_it_is_copied(site, dataset, node):
    index = shards.open_index(site.url)
    texts = index.texts("train", np.arange(index.sequences("train")))
    until(lambda: copies(node) == names(dataset, "train"))
    site.gone.set()
    assert index.texts("train", np.arange(len(texts))) == texts
    with pytest.raises(UserError, match=r"cannot read http://.*/index\.json: .*disconnected"):
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


def test_a_damaged_block_of_a_url_is_named(site):
    index = shards.open_index(site.url)
    first = index.blocks[index.blocks["shard"] == 1][0]
    path = site.folder / "train-00001.tar"
    content = bytearray(path.read_bytes())
    content[int(first["tokens_offset"])] ^= 1
    path.write_bytes(content)
    block = f"{site.url}/train-00001.tar, block 0 is damaged (its checksum differs)"
    with pytest.raises(DamageError, match=re.escape(block)):
        everything(index)
    assert shards.verify(site.url).problems[1:] == [block]


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


@pytest.mark.parametrize("fault", [500, 503, "cut"])
def test_requests_that_fail_are_tried_three_times(site, dataset, node, fault):
    name = ("train-00000.tar", "part")
    site.faults = {name: [fault, fault]}
    assert everything(shards.open_index(site.url)) == everything(shards.open_index(dataset))
    site.faults = {name: [fault] * 9}
    message = rf"{site.url}/{name[0]}, block \d+: "
    with pytest.raises(DamageError, match=message):
        everything(shards.open_index(site.url, Cache(node / "another")))


def test_a_missing_shard_is_named(site):
    (site.folder / "train-00001.tar").unlink()
    file = f"{site.url}/train-00001.tar"
    message = rf"{file}, block \d+: {file} does not exist"
    with pytest.raises(DamageError, match=message):
        everything(shards.open_index(site.url))
    n = shards.open_index(site.url).sequences("train")
    with ShardStream(site.url, seed=0, global_batch_size=n, on_corrupt="skip") as stream:
        assert 0 < (next(stream).weights == 0).sum() < n
    assert shards.verify(site.url).problems == [f"{file} is missing"]


def test_a_server_without_ranges_is_named(site):
    site.ranges = False
    with pytest.raises(UserError, match=f"{site.url} sends only whole files"):
        everything(shards.open_index(site.url))


@pytest.mark.parametrize("listed", [True, False])
def test_a_tokenizer_comes_from_a_server_that_lists_its_folder_or_does_not(site, dataset, listed):
    site.listed = listed
    (site.folder / "tokenizer" / "sub").mkdir()
    (site.folder / "tokenizer" / "?C=M;O=A").write_text("to sort the list by date")
    tokenizer = shards.open_index(site.url).tokenizer()
    assert tokenizer.get_vocab() == shards.open_index(dataset).tokenizer().get_vocab()


def test_the_least_recently_used_files_of_other_datasets_make_room(site, dataset, node):
    sizes = {name: (dataset / name).stat().st_size for name in names(dataset, "train")}
    room = sum(sizes.values()) + (dataset / "blocks.npy").stat().st_size
    for age, name in enumerate(["new", "old"]):
        other = node / "other" / f"{name}.tar"
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


def test_a_full_disk_is_said_once(site, dataset, node, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    index = shards.open_index(site.url)
    assert len(index.blocks)
    monkeypatch.setattr("os.fsync", full)
    for _ in range(2):
        assert everything(index) == everything(shards.open_index(dataset))
    until(lambda: not threads())
    assert capsys.readouterr().err.count(f"cache {node}: No space left on device") == 1
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


def test_inspect_and_verify_take_urls(site):
    run = CliRunner().invoke
    shown = run(app, ["inspect", site.url, "--json"])
    assert json.loads(shown.stdout)["examples"]["train"]
    assert run(app, ["verify", site.url]).exit_code == 0
    (site.folder / "train-00000.tar").unlink()
    result = run(app, ["verify", site.url])
    assert result.exit_code == 1
    assert result.stdout == f"{site.url}/train-00000.tar is missing\n"


def test_protocols_that_cannot_be_read_are_one_line(monkeypatch):
    missing = {"class": "missing.FileSystem", "err": "install it"}
    monkeypatch.setitem(known_implementations, "missing", missing)
    for url, message in [
        ("missing://bucket", r"pip install 't5vae\[remote\]' \(install it\)"),
        ("nothing://bucket", "cannot open nothing://bucket: Protocol not known"),
    ]:
        with pytest.raises(UserError, match=message):
            shards.open_index(url)


def test_an_index_cannot_name_files_elsewhere(site):
    index = json.loads((site.folder / "index.json").read_text())
    index["shards"][0]["name"] = "../elsewhere.tar"
    (site.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DamageError, match=r"index\.json"):
        shards.open_index(site.url)
