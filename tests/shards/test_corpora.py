import errno
import gzip
import io
import os
import pickle
from pathlib import Path

import fsspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.write.corpora import Corpus, combine
from t5vae.common.errors import StorageError, UserError
from tests.shards.sources import LINES, PACK, read, reading, write
from tests.weather import Weather


@pytest.mark.parametrize("suffix", PACK)
def test_text_files_plain_and_compressed(tmp_path, suffix):
    content = ("\ufeff" + "\r\n".join([*LINES, "", "   "])).encode()
    two_frames = PACK[suffix](content[:9]) + PACK[suffix](content[9:])
    (tmp_path / f"a.{suffix}").write_bytes(two_frames)
    pass_over = reading(Corpus(tmp_path / f"a.{suffix}"))
    assert [text for texts in pass_over for text in texts] == LINES
    assert pass_over.skipped == {"empty": 2}
    assert pass_over.bytes_read == len(two_frames)


@settings(deadline=None)
@given(
    content=st.text(st.sampled_from("ab é\u2028\x0b\x85\r\n"), max_size=60),
    chunk=st.integers(1, 20),
)
def test_lines_end_at_newlines_alone_wherever_a_chunk_ends(tmp_path_factory, content, chunk):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(content.encode())
    expected = [line.rstrip("\r\n") for line in io.StringIO(content, newline="\n")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.write.formats.text.CHUNK", chunk)
        pass_over = reading(Corpus(path))
        texts = [text for texts in pass_over for text in texts]
    assert texts == [line for line in expected if line.strip()]
    assert pass_over.skipped["empty"] == len(expected) - len(texts)


def test_long_corpora_come_in_lists_of_some_thousands(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("".join(f"{number}-{i}\n" for i in range(3000)))
    sizes = [len(items) for items in reading(Corpus(tmp_path))]
    assert sizes == [6000, 3000]


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("kind", ["txt", "gz", "zst", "csv", "parquet"])
def test_a_corpus_read_in_parts_is_the_same(tmp_path, kind, groups):
    for number in range(3):
        path = tmp_path / f"{number}.{kind}"
        if kind in PACK:
            path.write_bytes(PACK[kind](f"{number}\n\nline\n".encode()))
        else:
            write(path, kind)
    corpus = Corpus(tmp_path, *((kind, "t") if kind not in PACK else ()))
    parts = [reading(corpus, corpus.files[start::groups]) for start in range(groups)]
    items = [item for part in parts for items in part for item in items]
    assert sorted(items) == sorted(item for items in reading(corpus) for item in items)
    digests = {
        file: digest
        for part in parts
        for file, digest in zip(part.files, part.digests, strict=True)
    }
    assert combine(digests[file] for file in corpus.files) == corpus.sha256()
    assert sum(part.bytes_read for part in parts) == corpus.describe()["bytes"]
    assert pickle.loads(pickle.dumps(corpus.files)) == corpus.files


def test_a_corpus_describes_itself_and_tells_when_a_file_changes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    corpus = Corpus(path, name="-")
    expected = {"source": "-", "format": "text", "column": None, "files": 1, "bytes": 4}
    assert corpus.describe() == expected
    assert corpus.kind == "text"
    before = corpus.sha256()
    path.write_text("two\n")
    assert Corpus(path).sha256() != before
    assert Corpus(path).files[0].stamp != corpus.files[0].stamp


def test_folders_and_globs(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.txt", ".hidden", ".git/c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == read(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert Corpus(f"{tmp_path}/*.txt").name == "*.txt"


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def test_urls_of_files_folders_and_globs(memory):
    memory.pipe("/a/b.txt", b"b\n")
    memory.pipe("/a/in/c.txt.gz", gzip.compress(b"c\n"))
    memory.pipe("/a/in/d.txt.zst", zstandard.compress(b"d\n"))
    memory.pipe("/a/.hidden/e.txt", b"e\n")
    memory.pipe("/a/.e.txt", b"e\n")
    assert read("memory://a/b.txt") == ["b"]
    assert read("memory://a") == read("memory://a/") == ["b", "c", "d"]
    assert read("memory://a/*/*.txt.*") == ["c", "d"]
    assert read("memory://a/*") == ["b"]
    assert read("simplecache::memory://a/in") == ["c", "d"]
    corpus = Corpus("memory://a")
    assert [file.bytes for file in corpus.files] == [2, *map(memory.size, memory.glob("/a/in/*"))]
    assert pickle.loads(pickle.dumps(corpus.files)) == Corpus("memory://a").files
    pass_over = reading(corpus)
    assert list(pass_over) == [["b", "c", "d"]]
    assert combine(pass_over.digests) == corpus.sha256()
    memory.pipe("/a/b.txt", b"B\n")
    assert Corpus("memory://a").files[0].stamp != corpus.files[0].stamp


def test_urls_of_every_format(memory, tmp_path):
    for kind in ("jsonl", "csv", "parquet", "webdataset"):
        suffix = "tar" if kind == "webdataset" else kind
        memory.put(str(write(tmp_path / "local", kind)), f"/{kind}/a.{suffix}")
        column = "t.txt" if kind == "webdataset" else "t"
        assert read(f"memory://{kind}", kind, column) == LINES
        assert read(f"memory://{kind}/a.{suffix}", kind, column) == LINES


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://nothing", "does not exist"),
        ("memory://nothing/*.txt", "no text files"),
        ("nonsense://a", "nonsense"),
        ("absent://a", "install absent-fs"),
        ("offline://a", "cannot connect"),
    ],
)
def test_urls_that_cannot_be_read_are_one_line(memory, source, message):
    class Offline(fsspec.AbstractFileSystem):
        protocol = "offline"

        def info(self, path, **kwargs):
            raise FileNotFoundError(path) from ConnectionError("cannot connect\nto a host")

    fsspec.register_implementation("offline", Offline, clobber=True)
    absent = "absent_package.Files"
    fsspec.register_implementation("absent", absent, errtxt="install absent-fs", clobber=True)
    with pytest.raises(UserError, match=message) as error:
        Corpus(source)
    assert source in str(error.value)
    assert "\n" not in str(error.value)


def test_a_url_that_fails_while_it_is_read_names_itself(memory):
    memory.pipe("/a.txt", b"a\n")
    corpus = Corpus("memory://a.txt")
    memory.rm("/a.txt")
    with pytest.raises(UserError, match=r"cannot read memory://a\.txt"):
        list(reading(corpus))


def test_the_standard_library_is_found_without_installed_packages():
    corpus = Corpus(None, "python")
    assert len(corpus.files) > 300
    assert not any("site-packages" in file.path for file in corpus.files)


def test_damaged_compressed_file_names_the_file(tmp_path):
    content = b"".join(b"text %d\n" % i for i in range(9999))
    damaged = bytearray(gzip.compress(content))
    damaged[100:200] = bytes(100)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content)[:-12])
    (tmp_path / "b.zst").write_bytes(b"no zstandard at all")
    (tmp_path / "c.zst").write_bytes(zstandard.compress(content) + zstandard.compress(content)[:-2])
    (tmp_path / "d.gz").write_bytes(damaged)
    (tmp_path / "e.gz").write_bytes(b"no gzip at all")
    for name in ("a.gz", "b.zst", "c.zst", "d.gz", "e.gz"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            read(tmp_path / name)


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Corpus(tmp_path / "nothing")
    with pytest.raises(UserError, match="no text files"):
        Corpus(tmp_path)
    with pytest.raises(UserError, match="no text files"):
        Corpus(f"{tmp_path}/*.txt")
    with pytest.raises(UserError, match="needs a source"):
        Corpus(None, "text")
    with pytest.raises(UserError, match="unknown format"):
        Corpus(tmp_path, "xml")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="no columns"):
        Corpus(tmp_path, "text", "t")
    corpus = Corpus(tmp_path)
    (tmp_path / "a.txt").unlink()
    for use in (corpus.sha256, lambda: list(reading(corpus))):
        with pytest.raises(UserError, match=r"a\.txt: No such file"):
            use()


@pytest.mark.parametrize("source", ["", "deep", "*", "a.txt"])
def test_files_that_cannot_be_looked_at_are_not_taken_for_missing(tmp_path, monkeypatch, source):
    Weather(monkeypatch)
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "deep/b.txt"):
        (tmp_path / name).write_text("a")
    found = Corpus(tmp_path / source).files
    stat, left = Path.stat, [errno.EIO, errno.ESTALE]

    def fail(path, **how):
        if left and str(path).endswith(".txt"):
            raise OSError(left[0] if len(left) > 2 else left.pop(), "away")
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", fail)
    assert Corpus(tmp_path / source).files == found
    assert not left
    left += [errno.EIO] * 3
    with pytest.raises(StorageError, match="the storage fails"):
        Corpus(tmp_path / source)
    left[:] = [errno.EACCES]
    with pytest.raises(UserError, match=r"cannot read .*: away"):
        Corpus(tmp_path / source)


def test_a_folder_that_cannot_be_listed_for_a_while_is_listed_whole(tmp_path, monkeypatch):
    for name in ("a/1.txt", "b/2.txt", "c/3.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("a")
    found = Corpus(tmp_path).files
    Weather(monkeypatch)
    scandir, left = os.scandir, [errno.EIO, errno.ENOTCONN]

    def fail(path):
        if left and str(path).endswith("b"):
            raise OSError(left.pop(), "away")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    assert Corpus(tmp_path).files == found
    assert [Path(file.path).name for file in found] == ["1.txt", "2.txt", "3.txt"]
    assert not left
