import csv
import gzip
import io
import json
import pickle
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.write.corpora import Corpus, Reading, combine
from t5vae.common.errors import UserError

LINES = ["a = 1", "naïve = 'ü'  ", "  indented"]
PACK = {"txt": bytes, "gz": gzip.compress, "zst": zstandard.compress}


def reading(corpus: Corpus, files=None) -> Reading:
    return Reading(corpus.files if files is None else files, corpus.format, corpus.column)


def read(*args) -> list:
    return [item for items in reading(Corpus(*args)) for item in items]


def write(path, kind):
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"n": 1, "t": line}) + "\n" for line in LINES))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["n", "t"], *([1, line] for line in LINES)])
    elif kind == "parquet":
        pq.write_table(pa.table({"n": [1] * 3, "t": LINES}), path)
    else:
        write_tar(path, [{"t.txt": line + "\n", "json": b"{}"} for line in LINES])
    return path


def write_tar(path, records):
    with webdataset.TarWriter(str(path)) as tar:
        for number, record in enumerate(records):
            tar.write({"__key__": f"{number:04d}", **record})
    return path


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
        patch.setattr("shards.write.readers.CHUNK", chunk)
        pass_over = reading(Corpus(path))
        texts = [text for texts in pass_over for text in texts]
    assert texts == [line for line in expected if line.strip()]
    assert pass_over.skipped["empty"] == len(expected) - len(texts)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "webdataset"])
def test_files_with_columns(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", kind)
    assert read(path, kind, "t.txt" if kind == "webdataset" else "t") == LINES
    with pytest.raises(UserError, match=r"'nope'.*: (n, t|json, t\.txt|t\.txt, json)$"):
        read(path, kind, "nope")
    with pytest.raises(UserError, match="--column"):
        read(path, kind)


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


SOURCE = '''"""A docstring."""
import os  # why
class A:
    "prose"
    def f(self): return 'ü', 1
    def g(self):
        if self.a: x = 1
        elif self.b: x = 2
        return (1,
                2)
        y = 3; z = 4
'''


def test_python_takes_one_line_statements_that_parse_alone(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text("print 'python 2'\n")
    (tmp_path / "c.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "d.py").write_text("-" * 200_000 + "1")
    (tmp_path / "e.py").write_bytes(b"x = '\xff'")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "d.py").write_text("left = out")
    pass_over = reading(Corpus(tmp_path, "python"))
    assert [text for texts in pass_over for text in texts] == [
        "import os",
        "def f(self): return 'ü', 1",
        "return 'ü', 1",
        "x = 1",
        "x = 2",
        "y = 3",
        "z = 4",
        "x = 'é'",
    ]
    assert pass_over.skipped == {"unparsable file": 3}
    assert len(pass_over.digests) == 5


def test_the_standard_library_is_found_without_installed_packages():
    corpus = Corpus(None, "python")
    assert len(corpus.files) > 300
    assert not any("site-packages" in file.path for file in corpus.files)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_webdataset_texts(tmp_path, suffix):
    records = [{"TXT": "two\nlines\n"}, {"txt": "\r\n"}, {"txt": "é", "jpg": b"\xff" * 3000}]
    tar = write_tar(tmp_path / "tar", records).read_bytes()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    (tmp_path / f"a.tar{suffix}").write_bytes(pack(tar))
    (tmp_path / "notes.txt").write_text("no tar file")
    corpus = Corpus(tmp_path, "webdataset")
    assert (corpus.kind, corpus.column) == ("text", "txt")
    pass_over = reading(corpus)
    assert list(pass_over) == [["two\nlines", "é"]]
    assert pass_over.skipped == {"empty": 1}
    assert combine(pass_over.digests) == corpus.sha256()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_webdataset_token_arrays(tmp_path):
    rows = [[3, 4, 1], [], [5, 2**31 - 1]]
    types = ["uint16", ">i8", "uint64"]
    records = [
        {"ids.npy": npy(np.array(row, t)), "txt.json": b"{}"}
        for row, t in zip(rows, types, strict=True)
    ]
    corpus = Corpus(write_tar(tmp_path / "a.tar", records), "webdataset")
    assert (corpus.kind, corpus.column) == ("tokens", "ids.npy")
    pass_over = reading(corpus)
    items = [item for items in pass_over for item in items]
    assert [np.frombuffer(item, "<i4").tolist() for item in items] == [rows[0], rows[2]]
    assert pass_over.skipped == {"empty": 1}


def test_webdataset_passes_over_what_is_no_record(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [("a", tarfile.DIRTYPE), ("a/0.txt", tarfile.SYMTYPE)]:
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
        for name in ("README", "a/._1.txt", "a/1.txt", ".hidden"):
            header = tarfile.TarInfo(name)
            header.size = 1
            tar.addfile(header, io.BytesIO(b"x"))
    assert read(tmp_path / "a.tar", "webdataset") == ["x"]


@pytest.mark.parametrize(
    ("record", "there"),
    [
        ({"json": b"{}", "jpg": b""}, "there are: jpg, json"),
        ({"txt": "a", "ids.npy": npy([1])}, "there are: ids.npy, txt"),
    ],
)
def test_webdataset_members_to_choose_from_are_listed(tmp_path, record, there):
    with pytest.raises(UserError, match=there):
        Corpus(write_tar(tmp_path / "a.tar", [record]), "webdataset")


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("txt", b"\xff\xfe", "UTF-8"),
        ("txt", b"a\0", "binary"),
        ("npy", b"", "no .npy array"),
        ("npy", b"no array", "no .npy array"),
        ("npy", npy([1, 2])[:-3], "no .npy array"),
        ("npy", npy(np.array([{}], object)), "no .npy array"),
        ("npy", npy([[1]]), "2-D of int64"),
        ("npy", npy(1), "0-D"),
        ("npy", npy([1.0]), "float64"),
        ("npy", npy([True]), "bool"),
        ("npy", npy([4, -1]), "-1 to 4"),
        ("npy", npy([2**31]), "2147483648"),
    ],
)
def test_bad_records_are_named(tmp_path, member, content, message):
    path = write_tar(tmp_path / "a.tar", [{member: content}])
    with pytest.raises(UserError, match=message) as error:
        read(path, "webdataset", member)
    assert str(error.value).startswith(f"{path}, record '0000'")
    assert "\n" not in str(error.value)


def test_a_record_with_a_member_twice_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(UserError, match="'1': more than one member 'txt'"):
        read(tmp_path / "a.tar", "webdataset")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_tar_file_cut_anywhere_is_an_error(tmp_path, suffix):
    records = [{"txt": "text", "json": b"{}"}] * 3
    whole = write_tar(tmp_path / "whole", records).read_bytes()
    with tarfile.open(tmp_path / "whole") as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path = tmp_path / f"a.tar{suffix}"
    for cut in [*range(0, end + 1, 512), *range(7, end, 311)]:
        content = whole[:cut]
        path.write_bytes(gzip.compress(content, 1) if suffix else content)
        with pytest.raises(UserError, match="no whole tar file") as error:
            read(path, "webdataset", "txt")
        assert str(path) in str(error.value)
    path.write_bytes(gzip.compress(whole)[:-9] if suffix else whole[: end + 512])
    if suffix:
        with pytest.raises(UserError, match=f"cannot read {path}"):
            read(path, "webdataset", "txt")
    else:
        assert read(path, "webdataset") == ["text"] * 3


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_tar_file_is_an_error_or_read(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    content = bytearray(write_tar(path, [{"ids.npy": npy([1, 2])}] * 2).read_bytes()[:5120])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 4096))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert len(read(path, "webdataset")) <= 2
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 both outcomes are right


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (b"\x00\x01\x02\n", (), "binary"),
        (b"ok\n\xff\xfe\n", (), "UTF-8"),
        (b"{}\n[1]\n", ("jsonl", "t"), "line 1"),
        (b'{"t": "a"}\n\n[1]\n', ("jsonl", "t"), "line 3: .* list"),
        (b'{"t": 1}\n', ("jsonl", "t"), "not text"),
        (b'{"t": "\\ud800"}\n', ("jsonl", "t"), "Unicode"),
        (b"not json\n", ("jsonl", "t"), "not a JSON object"),
        (b"[" * 100_000, ("jsonl", "t"), "not a JSON object"),
        (b"", ("csv", "t"), "no column 't'"),
        (b"t\n\xff\n", ("csv", "t"), "UTF-8"),
        (b"t\n" + b"a" * 200_000, ("csv", "t"), "line 1: field larger"),
        (b"nothing", ("parquet", "t"), "not a parquet file"),
        (b"nothing", ("webdataset",), "no whole tar file"),
        (b"nothing", ("webdataset", "txt"), "no whole tar file"),
    ],
)
def test_bad_content_names_the_file(tmp_path, content, args, message):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(path, *args)
    assert "bad" in str(error.value)
    assert "\n" not in str(error.value)


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
    with pytest.raises(UserError, match="no columns"):
        Corpus(tmp_path, "text", "t")
    (tmp_path / "a.txt").write_text("a")
    corpus = Corpus(tmp_path)
    (tmp_path / "a.txt").unlink()
    for use in (corpus.sha256, lambda: list(reading(corpus))):
        with pytest.raises(UserError, match=r"a\.txt: No such file"):
            use()
