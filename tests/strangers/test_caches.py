"""What other users put into a cache, or a folder of a build, and what a server sends."""

import hashlib
import json
import os
import shutil
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

import shards
from shards.storage.cache import Cache, CacheError, Copies
from shards.storage.ranges import RangeCache
from shards.storage.requests import Remote, check_url
from shards.write.corpora import Corpus
from t5vae.common.errors import UserError
from t5vae.common.workfolder import work_folder
from tests.shards.site import Server, serving
from tests.strangers.conftest import WRITTEN
from tests.strangers.watch import watched

VERSION = "0" * 64
CONTENT = b"the content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


class File:
    """A remote file of a few bytes."""

    url, size = "memory://x", len(CONTENT)

    def __init__(self):
        self.left = [CONTENT, b""]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, size):
        return self.left.pop(0)


@pytest.fixture
def copies(tmp_path) -> Copies:
    copies = Copies(Cache(tmp_path / "cache"), VERSION)
    copies.folder.mkdir(parents=True)
    (tmp_path / "victim").write_text("mine")
    return copies


@pytest.fixture
def make(copies, tmp_path):
    """Makes the copy `a` under a watch, or fails to."""

    def run() -> None:
        with watched(tmp_path / "cache", tmp_path / "none") as watch:
            try:
                copies.make("a", SHA256, File)
            finally:
                assert watch.deeds == []
                assert (tmp_path / "victim").read_text() == "mine"

    return run


def test_the_cache_is_its_users_alone(tmp_path, copies, make):
    shutil.rmtree(tmp_path / "cache")
    make()
    assert (copies.folder / "a").read_bytes() == CONTENT
    assert {oct(path.stat().st_mode & 0o777) for path in (copies.folder, copies.folder.parent)} == {
        "0o700"
    }


def put(what: str, path: Path, tmp_path: Path) -> None:
    """Put something that is no file in a file's place."""
    match what:
        case "link":
            path.symlink_to(tmp_path / "victim")
        case "dangling":
            path.symlink_to(tmp_path / "new")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()


@pytest.mark.parametrize("name", ["a.lock", "../all.lock"])
@pytest.mark.parametrize("what", ["link", "dangling", "fifo", "folder"])
def test_a_lock_that_is_none_is_refused(copies, make, tmp_path, name, what):
    put(what, copies.folder / name, tmp_path)
    with pytest.raises(CacheError, match="T5VAE_CACHE"):
        make()
    assert not (tmp_path / "new").exists()


def test_a_part_that_is_a_link_is_replaced(copies, make, tmp_path):
    (copies.folder / "a.part").symlink_to(tmp_path / "victim")
    make()
    assert not (copies.folder / "a").is_symlink()


@pytest.mark.parametrize("name", ["a", ""])
def test_a_copy_or_a_version_that_is_a_link_is_refused(copies, make, tmp_path, name):
    (tmp_path / "other").mkdir()
    if not name:
        copies.folder.rmdir()
    (copies.folder / name).symlink_to(tmp_path / ("victim" if name else "other"))
    with pytest.raises(CacheError, match="is a link"):
        make()


@as_root
@pytest.mark.parametrize("name", ["a", ""])
def test_a_copy_or_a_version_of_another_user_is_refused(copies, make, name):
    (copies.folder / "a").write_bytes(b"evil content")
    os.chown(copies.folder / name, 12345, 12345)
    with pytest.raises(CacheError, match="belongs to another user"):
        make()


def test_a_cache_that_anybody_may_change_is_refused_unless_names_are_kept(copies, make):
    os.chmod(copies.cache.folder, 0o777)
    with pytest.raises(CacheError, match="any user may"):
        make()
    os.chmod(copies.cache.folder, 0o1777)  # as /tmp has it
    os.chmod(copies.folder, 0o777)
    make()
    assert copies.folder.stat().st_mode & 0o777 == 0o700


def test_what_lies_beside_the_copies_never_makes_room_for_them(copies, make, tmp_path):
    (copies.cache.folder / "mine").mkdir()
    (copies.cache.folder / "mine" / "thesis").write_bytes(bytes(10**5))
    (copies.cache.folder / ("1" * 64)).symlink_to(copies.cache.folder / "mine")
    copies.cache = Cache(copies.cache.folder, 100)
    make()
    assert (copies.cache.folder / "mine" / "thesis").exists()


# --- a folder of a build


def lead(folder: Path, target: Path, what: str) -> None:
    match what:
        case "folder":
            folder.symlink_to(target)
        case "lock":
            folder.mkdir()
            (folder / "lock").symlink_to(target / "file")
        case "dangling lock":
            folder.mkdir()
            (folder / "lock").symlink_to(target / "new")
        case "fifo":
            folder.mkdir()
            os.mkfifo(folder / "lock")


@pytest.mark.parametrize("what", ["folder", "lock", "dangling lock", "fifo"])
def test_a_build_works_in_no_folder_that_leads_elsewhere(tmp_path, what):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    (tmp_path / "inside").mkdir()
    lead(tmp_path / "inside" / ".out.build", victim, what)
    with (
        watched(tmp_path / "inside", tmp_path / "none") as watch,
        pytest.raises(UserError, match="remove "),
        work_folder(tmp_path / "inside" / "out", lambda _: True),
    ):
        pass
    assert watch.deeds == []
    assert [path.name for path in victim.iterdir()] == ["file"]
    assert (victim / "file").read_text() == "mine"


@as_root
def test_nor_in_another_users(tmp_path):
    (tmp_path / ".out.build").mkdir()
    os.chown(tmp_path / ".out.build", 12345, 12345)
    with pytest.raises(UserError, match="no folder of yours"), work_folder(tmp_path / "out", bool):
        pass


def test_what_a_halted_build_left_elsewhere_is_removed_and_not_used(tmp_path, command, handed):
    arguments = (
        *("shards", "build", "lines.txt", "--out", "new/data", "--tokenizer", "byte"),
        *("--max-length", 9, "--workers", 1),
    )
    (handed.folder / "lines.txt").write_text("x = 1\ny = 2\n" * 9)
    (handed.folder / "new").mkdir()
    with suppress(KeyboardInterrupt), work_folder(Path("new/data"), bool) as work:
        (work / "parts").mkdir()
        raise KeyboardInterrupt
    copied = shutil.copytree("new/.data.build", "copied")
    shutil.rmtree("new/.data.build")
    (Path("x")).mkdir()  # takes the number that is free
    shutil.copytree(copied, "new/.data.build")
    (handed.folder.parent / "victim").write_text("mine")
    for name in ("stdin", "dataset", "parts/recipe.json", "parts/read", "parts/tokenizer.part"):
        (Path("new/.data.build") / name).symlink_to(handed.folder.parent / "victim")
    done = command(*arguments)
    assert done.deeds == []
    assert done.code == 0
    assert (handed.folder.parent / "victim").read_text() == "mine"
    assert shards.verify("new/data").ok


# --- a server


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("T5VAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("t5vae.common.storage._patience", 0.1)
    with serving(Path(shutil.copytree(WRITTEN / "shards", tmp_path / "site"))) as site:
        yield site


NAMES = ["../../x.json", "/etc/x.json", ".x.json", "x.sh", "x.py", "a\nb.json", "%2e%2e%2fx.json"]


def test_only_names_of_a_tokenizers_files_are_taken_from_a_list(tmp_path, site, monkeypatch):
    page = "".join(f"<a href='{name}'>" for name in [*NAMES, "tokenizer.json", "x.json"])
    remote = Remote(site.url)
    get = remote._fs.cat_file
    sent = {f"{site.url}/tokenizer": page.encode(), f"{site.url}/tokenizer/x.json": b"{}"}
    monkeypatch.setattr(remote._fs, "cat_file", lambda url: sent.get(url) or get(url))
    assert (
        {"tokenizer.json", "x.json"}
        <= set(remote.folder("tokenizer"))
        <= {
            "tokenizer.json",
            "x.json",
            "b.json",
            "2fx.json",
        }
    )


def test_thousands_of_names_are_refused(site, monkeypatch):
    remote = Remote(site.url)
    page = "".join(f"<a href='{n}.json'>" for n in range(10_000)).encode()
    monkeypatch.setattr(remote._fs, "cat_file", lambda url: page)
    with pytest.raises(OSError, match="more than 64 files"):
        remote.folder("tokenizer")


def test_a_list_whose_links_take_long_to_find_takes_no_time(site, monkeypatch):
    remote = Remote(site.url)
    monkeypatch.setattr(remote._fs, "cat_file", lambda url: b"<a " * 10**6)
    with pytest.raises(FileNotFoundError):
        remote.folder("tokenizer")


class Endless(BaseHTTPRequestHandler):
    """Sends zeros for ever, or to another place."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.path.startswith("/there"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(2**20))
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def endless(monkeypatch):
    monkeypatch.setattr("t5vae.common.storage._patience", 0.1)
    server = Server(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_an_answer_without_an_end_is_cut_off(endless, tmp_path):
    with watched(tmp_path, tmp_path), pytest.raises(UserError, match="more than"):
        shards.open_index(endless)
    with watched(tmp_path, tmp_path), pytest.raises(OSError, match="more than"):
        Remote(endless).read("train-00000.tar", 0, 100)


def test_a_redirect_leads_to_no_file(endless):
    with pytest.raises(UserError, match="cannot read"):
        shards.open_index(f"{endless}/there")


def test_a_dataset_at_a_url_is_checked_as_one_in_a_folder(site):
    index = json.loads((site.folder / "index.json").read_text())
    blocks = np.load(site.folder / "blocks.npy")
    blocks["tokens"][0] = 2**40
    np.save(site.folder / "blocks.npy", blocks)
    content = (site.folder / "blocks.npy").read_bytes()
    index["blocks_sha256"] = hashlib.sha256(content).hexdigest()
    (site.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        _ = shards.open_index(site.url).blocks


REFUSED = [
    "http://user:word@host/data",
    "s3://key:word@bucket/data",
    "simplecache::http://user:word@host/data",
    "reference://http://host/x.json",
    "reference::http://host/x.json",
    "zip://x::reference::http://host/x.json",
    "filecache::http://host/data",
    "dask://host/data",
    "generic://host/data",
    "simplecache://host/data",
    "http://[",
]


@pytest.mark.parametrize("url", REFUSED)
def test_urls_that_hold_passwords_or_read_others_are_refused(handed, refused, url):
    for arguments in (
        ("shards", "inspect", url),
        ("shards", "verify", url),
        ("config", "show", "run/config.yaml", f"data.shards={url}"),
        ("shards", "build", url, "--out", "new", "--tokenizer", "byte", "--max-length", 9),
    ):
        assert "word" not in refused(*arguments).replace("password", "")
    assert not (handed.folder / "new").exists()


@pytest.mark.parametrize(
    "url",
    ["http://user@host/x", "s3://bucket/a@b:c", "zip://x.csv::https://h/x.zip", "ssh://u@h/x"],
)
def test_others_are_not(url):
    check_url(url)


def test_a_signature_in_a_url_is_not_written_down(site):
    (site.folder / "x.txt?signature=word").write_text("x = 1\n")
    corpus = Corpus(f"{site.url}/x.txt?signature=word", "text")
    assert corpus.describe()["source"] == "x.txt"


def test_a_local_url_is_a_folder(handed):
    assert shards.open_index(f"local://{handed.shards}").sequences("train") == 1077
    (handed.shards / "index.json").unlink()
    os.mkfifo(handed.shards / "index.json")
    with pytest.raises(UserError, match="no regular file"):
        shards.open_index(f"local://{handed.shards}")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.ranges"])
@pytest.mark.parametrize("what", ["link", "dangling", "fifo", "folder"])
def test_ranges_are_kept_in_files_of_this_user_alone(copies, tmp_path, capsys, name, what):
    ranges = RangeCache(copies, "s3://bucket/data")
    put(what, copies.folder / name, tmp_path)
    with watched(tmp_path / "cache", tmp_path / "none") as watch:
        for _ in range(2):
            assert ranges.read("a.tar", 0, 3, lambda: b"abc") == b"abc"
    assert watch.deeds == []
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr().err.count("what it has no copy of is read from s3://bucket") == 1


@as_root
def test_ranges_of_another_user_are_not_read(copies, capsys):
    ranges = RangeCache(copies, "s3://bucket/data")
    ranges.read("a.tar", 0, 3, lambda: b"abc")
    os.chown(copies.folder / "a.tar", 12345, 12345)
    assert ranges.read("a.tar", 0, 3, lambda: b"new") == b"new"
    assert "belongs to another user" in capsys.readouterr().err
