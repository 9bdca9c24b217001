"""What commands on a latent space read, leave out, and print to be read again."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t5vae.latent.corpus import FileTexts
from tests.latent import tiny

BOM = b"\xef\xbb\xbf"
PAIRS = b"x = a + b\tx = a - b\ny = x + 1\ty = x - 1\nreturn a + b\treturn a - b\n"
CELLS = 'text,n\n"first 0\nsecond 0",1\n,2\n"a ""b"", c",3\n"one\r\ntwo",4\nplain,5\n'
LONG = "long " * 20
READ = ["first 0\nsecond 0", 'a "b", c', "one\r\ntwo", "plain"]


@pytest.fixture
def ok(ok, used_run):
    """The same of `t5vae COMMAND RUN ...`."""
    return lambda command, *arguments, **how: ok(command, used_run, *arguments, **how)


@pytest.fixture
def piped():
    """The name of a pipe that holds some bytes, as a shell's `<(...)` has one."""
    opened = []

    def make(data: bytes) -> str:
        reader, writer = os.pipe()
        opened.append(reader)
        os.write(writer, data)
        os.close(writer)
        return f"/dev/fd/{reader}"

    yield make
    for reader in opened:
        os.close(reader)


@pytest.fixture
def cells(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_bytes(CELLS.encode())
    return path


def texts_in(found) -> list[str]:
    return [row["text"] for row in found["texts"]]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as in UTF-8 and C locales
@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (BOM + b"a\nb\n", ["a", "b"]),
        ("é\u2028b\x0cc\x85d\ne\r\n".encode(), ["é\u2028b\x0cc\x85d", "e"]),
        (b"a\n\n  \nb", ["a", "", "  ", "b"]),
        (b"\n", [""]),
    ],
)
def test_standard_input_is_a_text_a_line(document, data, texts, errors):
    found = document("encode", stdin=data, errors=errors)
    assert texts_in(found) == texts
    assert found["left_out"] == 0
    assert not any("row" in row for row in found["texts"])


@pytest.mark.parametrize("data", [b"a\n\xff\n", b"a\n\x00\n", gzip.compress(b"a\n", mtime=0)])
def test_a_standard_input_that_is_no_text_is_one_line(error_line, used_run, data):
    assert "standard input is " in error_line("encode", used_run, stdin=data)


@pytest.mark.parametrize(
    "data",
    [
        BOM + PAIRS,
        PAIRS.replace(b"\n", b"\r\n"),
        PAIRS + b"\n",
        b"\n" + PAIRS.replace(b"\n", b"\n \n\n"),
    ],
    ids=["byte order mark", "carriage returns", "a blank last line", "blank lines"],
)
def test_pairs_are_read_as_texts_are(document, tmp_path, data, piped):
    plain, file = tmp_path / "plain.tsv", tmp_path / "pairs.tsv"
    plain.write_bytes(PAIRS)
    expected = document("direction", "--pairs", plain, "y = 1")
    assert expected["pairs"] == 3
    file.write_bytes(data)
    assert document("direction", "--pairs", file, "y = 1") == expected
    assert document("direction", "--pairs", "-", "y = 1", stdin=data) == expected
    assert document("direction", "--pairs", piped(data), "y = 1") == expected
    (tmp_path / "pairs.tsv.gz").write_bytes(gzip.compress(data))
    assert document("direction", "--pairs", tmp_path / "pairs.tsv.gz", "y = 1") == expected


@pytest.mark.parametrize("inside", ["\u2028", "\x0c", "\x85", "\x1e"])
def test_a_pair_ends_where_its_line_does(document, tmp_path, inside):
    (tmp_path / "pairs.tsv").write_text(f"a{inside}b\tc\nd\te\n")
    assert document("direction", "--pairs", tmp_path / "pairs.tsv", "y")["pairs"] == 2


def test_a_pair_that_is_none_is_named_by_its_line(error_line, used_run, tmp_path):
    (tmp_path / "pairs.tsv").write_text("\na\tb\n\nc\n")
    line = error_line("direction", used_run, "--pairs", tmp_path / "pairs.tsv", "y")
    assert "pairs.tsv, line 4: a pair is two texts" in line
    line = error_line("direction", used_run, "--pairs", "-", stdin=PAIRS)
    assert "one of them can come from standard input" in line


def test_pipes_are_files(document, piped):
    texts = document("encode", "x = 1", "y")["texts"]
    data = b"x = 1\n\ny\n"
    expected = [{**row, "row": number} for row, number in zip(texts, (0, 2), strict=True)]
    for how in ({"--file": piped(data)}, {"--file": "-"}):
        found = document("encode", *next(iter(how.items())), stdin=data)
        assert [{**row, "code": None} for row in found["texts"]] == [
            {**row, "code": None} for row in expected
        ]
        np.testing.assert_array_equal(
            [row["code"] for row in found["texts"]], [row["code"] for row in texts]
        )
        assert found["left_out"] == 1
    lines = piped("".join(f"{line}\n" for line in tiny.LINES[:40]).encode())
    assert document("fit-property", "length", "--file", lines)["n"] == 40


def test_a_shells_pipes_are_files(used_run, tmp_path):
    (tmp_path / "pairs.gz").write_bytes(gzip.compress(PAIRS))
    t5vae = Path(sys.executable).parent / "t5vae"
    done = subprocess.run(
        [
            *(
                "bash",
                "-c",
                '"$0" direction "$1" --pairs <(zcat pairs.gz) --file /dev/stdin --jsonl',
            ),
            *(t5vae, used_run),
        ],
        input="x = 1\n\ny = 2\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line)["from"] for line in done.stdout.splitlines()]
    assert rows == [{"text": "x = 1", "row": 0}, {"text": "y = 2", "row": 2}]
    assert "left out: 1 (empty)" in done.stderr


def test_codes_are_told_by_what_they_hold(ok, document, tmp_path, piped):
    as_json, lines = (
        ok("encode", "x = 1", "y", form)[0].encode() for form in ("--json", "--jsonl")
    )
    codes = [row["code"] for row in json.loads(as_json)["texts"]]
    np.save(tmp_path / "codes.npy", np.array(codes))
    array = (tmp_path / "codes.npy").read_bytes()
    one = lines.split(b"\n")[0]
    expected = document("decode", tmp_path / "codes.npy")["texts"]
    for data in (as_json, BOM + as_json, lines, BOM + lines, json.dumps(codes).encode(), array):
        assert document("decode", stdin=data)["texts"] == expected
        assert document("decode", piped(data))["texts"] == expected
    assert document("decode", stdin=one)["texts"] == expected[:1]


PRINT = {
    "encode": [],
    "reconstruct": [],
    "outliers": [],
    "dedupe": ["--radius", "0"],
    "nearest": ["-n", "2"],
    "direction": ["--pairs", "PAIRS", "--strength", "0", "--strength", "1"],
}
OF_SOME = {
    "interpolate": (2, ["--steps", "3"], 3),
    "grid": (4, ["--steps", "3"], 9),
    "neighbors": (1, ["-n", "5", "--radius", "0"], 1),
    "optimize": (1, ["--property", "length", "-n", "3"], None),
    "sample": (0, ["-n", "4"], 4),
}


@pytest.mark.parametrize("command", PRINT)
def test_what_is_printed_as_lines_of_json_is_read_back(ok, document, command, cells, tmp_path):
    (tmp_path / "pairs.tsv").write_bytes(PAIRS)
    options = [word.replace("PAIRS", str(tmp_path / "pairs.tsv")) for word in PRINT[command]]
    how = (*options, "--file", cells, "--column", "text")
    out, err = ok(command, *how, "--jsonl")
    lines = [json.loads(line) for line in out.splitlines()]
    assert all(next(iter(line)) == "text" for line in lines)
    printed = [line["text"] for line in lines]
    (tmp_path / "out.jsonl").write_text(out)
    read = FileTexts(str(tmp_path / "out.jsonl"), "text").chunks(0)
    assert [text for _, texts in read for text in texts] == [text for text in printed if text]
    sources = [line.get("to", line.get("from", line)) for line in lines]
    by_row = {source["row"]: source["text"] for source in sources}
    assert by_row == dict(zip((0, 2, 3, 4), READ, strict=True))
    assert "left out: 1 (empty)" in err
    found = document(command, *how)
    assert (found["left_out"], found["reasons"]) == (1, {"empty": 1})
    if command in ("encode", "reconstruct", "outliers"):
        assert [{**row, "code": 0} for row in found["texts"]] == [
            {**line, "code": 0} for line in lines
        ]
    err = ok(command, *how)[1]
    assert "hold line breaks: --jsonl prints what can be read back" in err
    assert "hold line breaks" not in ok(command, *options, "a", "b")[1]


@pytest.mark.parametrize("command", OF_SOME)
def test_lines_of_json_are_what_the_document_says(ok, document, command):
    count, options, lines = OF_SOME[command]
    given = (*options, *tiny.LINES[:count])
    printed = [json.loads(line) for line in ok(command, *given, "--jsonl")[0].splitlines()]
    found = document(command, *given)
    texts = found["candidates"] if command == "optimize" else found["texts"]
    if command == "grid":
        assert [line["place"] for line in printed] == [[i, j] for i in range(3) for j in range(3)]
        texts = [text for row in texts for text in row]
    assert len(printed) == (len(texts) if lines is None else lines)
    for text, line in zip(texts, printed, strict=True):
        assert (text if isinstance(text, dict) else {"text": text}).items() <= line.items()


def test_candidates_of_codes_as_lines_of_json(ok, tmp_path):
    np.save(tmp_path / "codes.npy", np.zeros((2, 6)))
    out = ok("decode", tmp_path / "codes.npy", "-n", 2, "--temperature", 1, "--jsonl")[0]
    assert [json.loads(line)["number"] for line in out.splitlines()] == [0, 0, 1, 1]


@pytest.mark.parametrize("forms", [["--json", "--jsonl"], ["--jsonl", "--json"]])
@pytest.mark.parametrize("command", [*PRINT, *OF_SOME, "decode"])
def test_one_form_is_printed(error_line, command, forms):
    assert "--json and --jsonl: give one of them" in error_line(command, "run", *forms)


def test_a_folder_of_codes_says_what_was_left_out(ok, document, cells, tmp_path, t5vae, used_run):
    with open(cells, "a") as file:
        file.write(f"{LONG},6\n")
    out = tmp_path / "codes"
    how = ("--file", cells, "--column", "text", "--out", out)
    _, err = ok("encode", *how)
    assert "left out: 1 (empty), 1 (too many tokens)" in err
    found = document("encode", *how)
    reasons = {"empty": 1, "too many tokens": 1}
    assert (found["sequences"], found["left_out"], found["reasons"]) == (4, 2, reasons)
    assert np.load(out / "rows.npy").tolist() == [0, 2, 3, 4]
    lines = ok("dedupe", "--corpus", out, "--radius", 0, "--jsonl")[0].splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": text, "row": row} for text, row in zip(READ, (0, 2, 3, 4), strict=True)
    ]
    code, _, err = t5vae("encode", used_run, *how, "--jsonl")
    assert code == 2
    assert "--out writes what --jsonl would print" in err


def test_texts_without_a_value_are_counted(document, ok, tmp_path):
    table = tmp_path / "table.csv"
    rows = [f'"{text}",{i}' for i, text in enumerate(tiny.LINES[:20])]
    table.write_text("\n".join(["text,value", *rows, '"x = 1",', ",3", f"{LONG},4"]) + "\n")
    how = ("--file", table, "--column", "text", "--values", "value")
    found = document("fit-property", "number", *how)
    assert (found["n"], found["left_out"]) == (20, 3)
    assert found["reasons"] == {"empty": 1, "too many tokens": 1, "no value": 1}
    told = "left out: 1 (empty), 1 (too many tokens), 1 (no value)"
    assert told in ok("fit-property", "number", *how)[1]


def test_texts_with_too_many_tokens_are_told_with_those_that_are_empty(document, tmp_path):
    (tmp_path / "lines.txt").write_text(f"a\n\n{LONG}\nb\n")
    found = document("outliers", "--file", tmp_path / "lines.txt")
    assert sorted(row["row"] for row in found["texts"]) == [0, 3]
    assert found["reasons"] == {"empty": 1, "too many tokens": 1}


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("e.csv", b"text,n\n,1\n \xc2\xa0,2\n", ["--column", "text"], "left out: 2 (empty)"),
        ("e.csv", b"text\n", ["--column", "text"], "e.csv holds no texts"),
        ("e.csv", b"text\na\n", [], "name the text's column (--column)"),
        ("e.txt", b"", [], "e.txt holds no texts"),
        ("e.txt", b"\n \n", [], "e.txt holds no texts; left out: 2 (empty)"),
        ("e.txt", b"\x7fELF\x00", [], "e.txt is a binary file"),
        ("e.txt.gz", b"a\n", [], "cannot read"),
    ],
)
def test_a_file_without_texts_is_one_line(
    error_line, used_run, tmp_path, name, data, options, message
):
    (tmp_path / name).write_bytes(data)
    assert message in error_line("encode", used_run, "--file", tmp_path / name, *options)


def test_names_of_files_that_are_not_utf8_are_read_and_told(ok, used_run, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/n\xff.txt"))
    odd.write_text("x = 1\n")
    assert "x = 1" in ok("encode", "--file", folder)[0]
    assert "1 codes" in ok("encode", "--file", folder, "--out", tmp_path / "codes")[0]
    assert "1 codes" in ok("encode", "--file", folder, "--out", tmp_path / "codes")[0]
    odd.write_bytes(b"\x00")
    command = [sys.executable, "-m", "t5vae", "encode", used_run, "--file", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "n\\udcff.txt is a binary file" in line
