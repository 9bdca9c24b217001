"""Formats of corpora: what each reads, and one from elsewhere."""

from importlib import import_module

import pytest

import shards
from shards.write.corpora import Corpus
from shards.write.formats import FORMATS, format_of
from t5vae.common.errors import UserError
from tests.shards.sources import LINES, read, reading, write


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "webdataset"])
def test_files_with_columns(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", kind)
    assert read(path, kind, "t.txt" if kind == "webdataset" else "t") == LINES
    with pytest.raises(UserError, match=r"'nope'.*: (n, t|json, t\.txt|t\.txt, json)$"):
        read(path, kind, "nope")
    with pytest.raises(UserError, match="--column"):
        read(path, kind)


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
        (b"t\na\0b\n", ("csv", "t"), "binary"),
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


TOY = """
from shards.write.formats.format import Format

def read(stream, name, column):
    yield stream.read().decode().split("|")

TOY = Format(read, suffixes=(".toy",))
"""


def test_a_format_from_elsewhere_is_an_entry_in_the_table(corpus, tmp_path, monkeypatch):
    (tmp_path / "toy_format.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FORMATS, "toy", import_module("toy_format").TOY)
    monkeypatch.setattr("shards.write.stages.LEAST_GROUP", 1)
    lines = corpus.read_text().splitlines()
    for name, some in [("a.toy", lines[:500]), ("b.toy", lines[500:]), ("c.txt", ["none"])]:
        (tmp_path / name).write_text("|".join(some))
    options = {"tokenizer": "byte", "max_length": 48, "valid_fraction": 0, "overflow": "truncate"}
    for workers in (1, 2):  # other processes, which are started anew, know the format too
        index = shards.build(
            tmp_path, tmp_path / f"{workers}", format="toy", workers=workers, **options
        )
        assert index.recipe["format"] == "toy"
        assert (index.texts_read, index.recipe["files"]) == (1000, 2)
    assert format_of("s3://bucket/a.toy") == "toy"


def test_the_longest_ending_tells_the_format():
    named = {"a.csv.gz": "csv", "a.gz": "text", "a.py": "text", "a.tar": "webdataset", "a": "text"}
    assert {name: format_of(name) for name in named} == named
