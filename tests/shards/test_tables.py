"""Tables that are not as they should be: what is wrong is named, and nothing goes in silence."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import shards
from shards.write.corpora import Corpus, Reading
from t5vae.common.errors import UserError

OPTIONS = {"tokenizer": "byte", "max_length": 64, "valid_fraction": 0}
ROWS = [f"item {number} has value {7 * number}" for number in range(40)]


def table(**changed: str) -> str:
    """A CSV of the rows with some of them written otherwise: `_3` is the one of number 3."""
    rows = {f"_{number}": f"{number},{text}" for number, text in enumerate(ROWS)} | changed
    return "\n".join(["id,text", *rows.values()]) + "\n"


BAD = {
    "a quote never closed": (table(_3='3,"5 inch pipe'), {3: "line 5: a quote is opened"}),
    "the last quote never closed": (table(_39='39,"5 inch'), {39: "line 41: a quote is opened"}),
    "two of them": (
        table(_3='3,"5 inch', _20='20,"7 inch'),
        {3: "line 5: text follows a closing quote", 20: "line 22: a quote is opened"},
    ),
    "text after a quote": (table(_8='8,"5" pipe'), {8: "line 10: text follows a closing quote"}),
    "the first row": (table(_0='0,"5" pipe'), {0: "line 2: text follows a closing quote"}),
    "the first rows": (
        table(_0="0,a,b", _1='1,"5" pipe'),
        {0: "line 2: 3 cells", 1: "line 3: text follows a closing quote"},
    ),
    "a comma not quoted": (table(_5="5,one, two"), {5: "line 7: 3 cells, the header has 2"}),
    "cells that go on": (
        table(_2='2,"one\ntwo"', _5="5,one, two"),
        {5: "line 8: 3 cells, the header has 2"},
    ),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_of_csv_is_named_and_costs_no_other(tmp_path, case, end):
    content, bad = BAD[case]
    path = tmp_path / "a.csv"
    path.write_bytes(content.replace("\n", end).encode())
    corpus = Corpus(path, column="text")
    with pytest.raises(UserError, match=f"a.csv, {next(iter(bad.values()))}"):
        list(Reading(corpus.files, corpus.format, "text"))
    reading = Reading(corpus.files, corpus.format, "text", "skip")
    read = dict(pair for found in reading.numbered() for pair in zip(*found, strict=True))
    changed = {2} if "go on" in case else set()
    expected = {row: text for row, text in enumerate(ROWS) if row not in bad.keys() | changed}
    assert {row: text for row, text in read.items() if row not in changed} == expected
    assert reading.skipped == {"bad row": len(bad)}
    assert all(why in line for why, line in zip(bad.values(), reading.bad_rows, strict=True))


def test_a_quote_never_closed_is_found_before_all_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.write.formats.csv.LONGEST_CELL", 200)
    (tmp_path / "a.csv").write_text(table(_3='3,"5 inch pipe'))
    with pytest.raises(UserError, match="line 5: field larger than field limit"):
        list(Reading(*parts_of(Corpus(tmp_path / "a.csv", column="text"))))


def parts_of(corpus: Corpus) -> tuple:
    return corpus.files, corpus.format, corpus.column


@pytest.mark.parametrize("column", ["html", "text"])
def test_a_cell_may_be_long_in_any_column(tmp_path, column):
    cells = {"text": "short", "html": "y"} | {column: "x" * 1_000_000}
    (tmp_path / "a.csv").write_text(f"text,html\n{cells['text']},{cells['html']}\n")
    read = Reading(*parts_of(Corpus(tmp_path / "a.csv", column="text")))
    assert list(read) == [[cells["text"]]]


def test_a_column_of_two_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    twice = pyarrow.Table.from_arrays(columns, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(UserError, match=f"{name} has 2 columns 'text'"):
            list(Reading(*parts_of(Corpus(tmp_path / name, column="text"))))
    (tmp_path / "a.jsonl").write_text('{"text": "text"}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 2: the field 'text' is given 2 times"):
        list(Reading(*parts_of(Corpus(tmp_path / "a.jsonl", column="text"))))


def test_another_column_may_be_there_twice_and_rows_may_be_short(tmp_path):
    (tmp_path / "a.csv").write_text("id,text,n,n\n0,a,1,2\n\n1,b\n2\n")
    reading = Reading(*parts_of(Corpus(tmp_path / "a.csv", column="text")))
    assert list(reading.numbered()) == [([0, 1], ["a", "b"])]
    assert reading.skipped == {"empty": 1}


def test_bad_rows_end_a_build_or_are_counted_and_named(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_text(BAD["two of them"][0])
    (tmp_path / "in/b.csv").write_text(table(_5="5,one, two").replace("item", "thing"))
    for options in ({}, {"workers": 2}):
        with pytest.raises(UserError, match=r"\.csv, line .*; --bad-rows skip"):
            shards.build(tmp_path / "in", tmp_path / "d", column="text", **OPTIONS, **options)
    assert not (tmp_path / "d").exists()
    capsys.readouterr()
    index = shards.build(tmp_path / "in", tmp_path / "d", column="text", bad_rows="skip", **OPTIONS)
    assert (index.dropped, index.texts_read) == ({"bad row": 3}, 80)
    assert index.sequences("train") == 77
    said = capsys.readouterr().err
    assert said.count("left out: ") == 3
    assert "b.csv, line 7: 3 cells" in said
    assert "in is read as csv, by its name" in said
    with pytest.raises(UserError, match="was built with bad_rows skip"):
        shards.build(tmp_path / "in", tmp_path / "d", column="text", **OPTIONS)


def test_lines_that_are_no_objects_are_bad_rows_too(tmp_path):
    lines = ['{"t": "a"}', "{", "", "[1]", '{"n": 1}', '{"t": "b"}', '{"t": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = Corpus(tmp_path / "a.jsonl", column="t")
    reading = Reading(*parts_of(corpus), "skip")
    assert list(reading.numbered()) == [([0, 4], ["a", "b"])]
    assert reading.skipped == {"bad row": 3, "empty": 1}
    assert [line.rpartition("a.jsonl, ")[2] for line in reading.bad_rows] == [
        "line 2: not a JSON object",
        "line 4: not a JSON object, but list",
        "line 5: no field 't'; it has: n",
    ]


def test_a_line_of_text_too_long_to_hold_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.write.formats.text.LONGEST", 2**21)
    (tmp_path / "a.txt").write_text("a\n" + "x" * 2**23 + "\nb\n\n" + "y" * 2**22)
    corpus = Corpus(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a.txt, line 2: a line of more than"):
        list(Reading(*parts_of(corpus)))
    reading = Reading(*parts_of(corpus), "skip")
    assert [text for texts in reading for text in texts] == ["a", "b"]
    assert reading.skipped == {"bad row": 2, "empty": 1}
    assert "line 5" in reading.bad_rows[1]


NAMES = {
    "a.CSV": "csv",
    "b.Csv.GZ": "csv",
    "c.JSONL.zst": "jsonl",
    "d.parquet": "parquet",
    "e.txt": "text",
    "f.py": "text",
    "g": "text",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_tells_the_format(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    column = "t" if NAMES[name] in ("csv", "jsonl", "parquet") else None
    assert Corpus(tmp_path / name, column=column).format_name == NAMES[name]
    assert Corpus(tmp_path, column=column).format_name == NAMES[name]


def test_names_in_upper_case_are_decompressed(tmp_path):
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"a\nb\n"))
    (tmp_path / "B.Csv.ZST").write_bytes(zstandard.compress(b"n,t\n1,c\n"))
    assert list(Reading(*parts_of(Corpus(tmp_path / "A.TXT.GZ")))) == [["a", "b"]]
    assert list(Reading(*parts_of(Corpus(tmp_path / "B.Csv.ZST", column="t")))) == [["c"]]


def test_what_the_name_tells_is_said_where_it_does_not_fit(tmp_path):
    (tmp_path / "a.csv").write_text("id,smiles\n1,CCO\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"smiles": "C", "y": 1}))
    with pytest.raises(
        UserError, match=r"a.csv is read as csv, by its name: .*--column.* has: id, smiles$"
    ):
        Corpus(tmp_path / "a.csv")
    with pytest.raises(
        UserError, match=r"b.jsonl is read as jsonl, by its name: .* has: smiles, y$"
    ):
        Corpus(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="holds csv and jsonl files: choose those of one format"):
        Corpus(tmp_path, column="smiles")
    (tmp_path / "c.smi").write_text("CCO\n")
    with pytest.raises(UserError, match="read as text, by its name: that has no columns"):
        Corpus(tmp_path / "c.smi", column="smiles")
    assert len(Corpus(tmp_path, "csv", "smiles").files) == 1
    assert Corpus(tmp_path / "a.csv", "text").format_name == "text"  # as lines, where asked for
