import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from shards import UserError
from shards.corpora import Corpus

LINES = ["a = 1", "naïve = 'ü'  ", "  indented"]


def read(*args) -> list[str]:
    return [text for batch in Corpus(*args) for text in batch]


def write(path, kind):
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"n": 1, "t": line}) + "\n" for line in LINES))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["n", "t"], *([1, line] for line in LINES)])
    else:
        pq.write_table(pa.table({"n": [1] * 3, "t": LINES}), path)
    return path


@pytest.mark.parametrize("suffix", ["txt", "gz", "zst"])
def test_text_files_plain_and_compressed(tmp_path, suffix):
    content = ("\ufeff" + "\r\n".join([*LINES, "", "   "])).encode()
    pack = {"txt": bytes, "gz": gzip.compress, "zst": zstandard.compress}[suffix]
    two_frames = pack(content[:9]) + pack(content[9:])
    (tmp_path / f"a.{suffix}").write_bytes(two_frames)
    corpus = Corpus(tmp_path / f"a.{suffix}")
    assert [text for batch in corpus for text in batch] == LINES
    assert corpus.skipped["empty"] == 2


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_with_columns(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", kind)
    assert read(path, kind, "t") == LINES
    with pytest.raises(UserError, match=r"'nope'.* n, t"):
        read(path, kind, "nope")
    with pytest.raises(UserError, match="--column"):
        read(path, kind)


def test_folders_globs_and_standard_input(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == read(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert read("-") == ["one", "two"]


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
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "d.py").write_text("left = out")
    corpus = Corpus(tmp_path, "python")
    assert [text for batch in corpus for text in batch] == [
        "import os",
        "def f(self): return 'ü', 1",
        "return 'ü', 1",
        "x = 1",
        "x = 2",
        "y = 3",
        "z = 4",
        "x = 'é'",
    ]
    assert corpus.skipped == {"unparsable file": 1}


def test_the_standard_library_is_found_without_installed_packages():
    corpus = Corpus(None, "python")
    assert len(corpus.files) > 300
    assert not any("site-packages" in path.parts for path in corpus.files)


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (b"\x00\x01\x02\n", (), "binary"),
        (b"ok\n\xff\xfe\n", (), "UTF-8"),
        (b"{}\n[1]\n", ("jsonl", "t"), "line 1"),
        (b'{"t": 1}\n', ("jsonl", "t"), "not text"),
        (b'{"t": "\\ud800"}\n', ("jsonl", "t"), "Unicode"),
        (b"not json\n", ("jsonl", "t"), "not a JSON object"),
        (b"nothing", ("parquet", "t"), "not a parquet file"),
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
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text\n" * 999)[:-12])
    (tmp_path / "b.zst").write_bytes(b"no zstandard at all")
    (tmp_path / "c.zst").write_bytes(zstandard.compress(b"text\n" * 999)[:-2])
    for name in ("a.gz", "b.zst", "c.zst"):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Corpus(tmp_path / "nothing")
    with pytest.raises(UserError, match="no text files"):
        Corpus(tmp_path)
    with pytest.raises(UserError, match="needs a source"):
        Corpus(None, "text")
    with pytest.raises(UserError, match="unknown format"):
        Corpus(tmp_path, "xml")
