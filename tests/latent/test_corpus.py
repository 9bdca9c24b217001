"""Encoded corpora: whole or not there, taken up after a halt, never mistaken for another."""

import csv
import errno
import gzip
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import shards
from shards.format.tokenizers import load_tokenizer
from t5vae.common.errors import StorageError, UserError
from t5vae.latent import corpus, writer
from t5vae.latent.codec import Codec
from t5vae.latent.corpus import Corpus, FileTexts, GivenTexts, SplitTexts, encode_corpus
from tests.latent.tiny import LINES, random_model
from tests.weather import Weather, without_locks

TEXTS = [*LINES[:40], "é → ü", 'say "hi"\\n', " a  b ", "line\u2028separator"]
LONG = "long " * 20
SHA = "abc"


@pytest.fixture(scope="module")
def codec():
    tokenizer = load_tokenizer("byte")
    return Codec(random_model(len(tokenizer)), tokenizer)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 16)


@pytest.fixture
def calls(codec, monkeypatch):
    """How many texts each call has encoded."""
    sizes: list[int] = []

    def counted(ids):
        sizes.append(len(ids))
        return Codec.encode_ids(codec, ids)

    monkeypatch.setattr(codec, "encode_ids", counted)
    return sizes


def texts_of(source, begin: int = 0) -> list[str]:
    return [text for _, texts in source.chunks(begin) for text in texts]


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_texts_and_codes_lie_side_by_side(codec, tmp_path):
    made = encode_corpus(codec, GivenTexts([*TEXTS[:5], LONG, *TEXTS[5:]]), tmp_path / "c", SHA)
    assert (len(made), made.left_out) == (len(TEXTS), 1)
    assert made.texts(range(len(TEXTS))) == TEXTS
    assert made.texts([41, 0, 41]) == [TEXTS[41], TEXTS[0], TEXTS[41]]
    torch.testing.assert_close(made.codes_ND, codec.encode(TEXTS))
    again = Corpus.open(tmp_path / "c", SHA)
    assert torch.equal(again.codes_ND, made.codes_ND)
    assert again.texts(np.array([3])) == [TEXTS[3]]
    assert np.load(tmp_path / "c" / "codes.npy").dtype == np.float32
    assert (made.rows_N.dtype, made.rows_N.tolist()) == (
        np.int64,
        [*range(5), *range(6, len(TEXTS) + 1)],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


GAPS = "smiles,y\nitem 1,1\n,2\nitem 2,3\n   ,4\nitem 3,5\n"
LONG_CELLS = f'{GAPS}{LONG},6\n"a\nb",7\n,8\n'
FILES = {
    "cells": ({"a.csv": GAPS}, "smiles", [0, 2, 4], {"empty": 2}),
    "cells with line breaks, and a long one": (
        {"a.csv": LONG_CELLS},
        "smiles",
        [0, 2, 4, 6],
        {"empty": 3, "too many tokens": 1},
    ),
    "lines": ({"a.txt": f"x\n\n{LONG}\n \ny\n"}, None, [0, 4], {"empty": 2, "too many tokens": 1}),
    "no gaps": ({"a.txt": "x\ny"}, None, [0, 1], {}),
    "files that count on": (
        {"a.csv": GAPS, "b.csv": "smiles,y\n,1\nitem 4,2\n"},
        "smiles",
        [0, 2, 4, 6],
        {"empty": 3},
    ),
}


@pytest.mark.parametrize("files", FILES)
def test_codes_know_their_rows_and_what_is_left_out_is_counted(codec, tmp_path, files, capsys):
    contents, column, rows, reasons = FILES[files]
    (tmp_path / "in").mkdir()
    for name, content in contents.items():
        (tmp_path / "in" / name).write_text(content)
    source = FileTexts(str(tmp_path / "in"), column)
    made = encode_corpus(codec, source, tmp_path / "c", SHA)
    told = capsys.readouterr().err
    assert made.rows_N.tolist() == rows
    assert (made.reasons, made.left_out) == (reasons, sum(reasons.values()))
    for why, count in reasons.items():
        assert f"{count} ({why})" in told
    assert ("left out: " in told) == bool(reasons)
    kept = json.loads((tmp_path / "c" / "corpus.json").read_text())
    assert (kept["format_version"], kept["left_out"], kept["reasons"]) == (
        2,
        made.left_out,
        reasons,
    )
    if column:  # as another reader of tables numbers them
        tables = [csv.DictReader(io.StringIO(content)) for content in contents.values()]
        cells = [row[column] for table in tables for row in table]
        assert made.texts(range(len(rows))) == [cells[row] for row in rows]
    again = encode_corpus(codec, source, tmp_path / "c", SHA)
    assert again.rows_N.tolist() == rows
    assert ("left out: " in capsys.readouterr().err) == bool(reasons)


def test_a_folder_of_version_1_opens_and_is_encoded_anew_with_its_rows(codec, tmp_path, calls):
    source = GivenTexts([LONG, *LINES[:5]])
    encode_corpus(codec, source, tmp_path / "c", SHA)
    manifest = tmp_path / "c" / "corpus.json"
    kept = json.loads(manifest.read_text())
    del kept["reasons"]
    manifest.write_text(json.dumps({**kept, "format_version": 1}))
    (tmp_path / "c" / "rows.npy").unlink()
    old = Corpus.open(tmp_path / "c", SHA)
    assert old.rows_N is None
    assert (old.left_out, old.reasons) == (1, {"too many tokens": 1})
    assert old.texts(range(5)) == LINES[:5]
    calls.clear()
    encode_corpus(codec, source, tmp_path / "c", SHA)
    assert sum(calls) == 5
    assert Corpus.open(tmp_path / "c", SHA).rows_N.tolist() == [1, 2, 3, 4, 5]


def test_a_pipe_is_copied_once_and_told_by_what_it_holds(codec, tmp_path, calls):
    def piped(data: bytes) -> FileTexts:
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        source = FileTexts(f"/dev/fd/{reader}")
        os.close(reader)
        return source

    source = piped(b"\xef\xbb\xbfa\r\n\nb\xe2\x80\xa8\x0cc\n")
    made = encode_corpus(codec, source, tmp_path / "c", SHA)
    assert made.texts([0, 1]) == ["a", "b\u2028\x0cc"]
    assert made.rows_N.tolist() == [0, 2]
    calls.clear()
    encode_corpus(codec, piped(b"\xef\xbb\xbfa\r\n\nb\xe2\x80\xa8\x0cc\n"), tmp_path / "c", SHA)
    assert calls == []
    encode_corpus(codec, piped(b"a\nb\n"), tmp_path / "c", SHA)
    assert calls == [2]
    copy = source.copy
    assert copy.exists()
    del source
    assert not copy.parent.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\n\xff\n", "/dev/fd/[0-9]+ is not UTF-8 text"),
        (b"a\n\x00\n", "/dev/fd/[0-9]+ is a binary file"),
        (gzip.compress(b"a\n", mtime=0), "/dev/fd/[0-9]+ is not UTF-8 text"),
    ],
)
def test_a_pipe_that_is_no_text_is_named_as_given(data, message):
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    with pytest.raises(UserError, match=f"^{message}"):
        FileTexts(f"/dev/fd/{reader}")
    os.close(reader)


def test_what_is_encoded_is_opened_and_what_changed_is_encoded_anew(codec, tmp_path, calls):
    out = tmp_path / "c"
    encode_corpus(codec, GivenTexts(TEXTS), out, SHA)
    calls.clear()
    encode_corpus(codec, GivenTexts(TEXTS), out, SHA)
    assert calls == []
    encode_corpus(codec, GivenTexts(TEXTS), out, "abd")
    assert sum(calls) == len(TEXTS)
    shorter = encode_corpus(codec, GivenTexts(TEXTS[:3]), out, "abd")
    assert len(shorter) == len(Corpus.open(out, "abd")) == 3


def test_a_changed_file_is_encoded_anew(codec, tmp_path, calls):
    lines = tmp_path / "lines.txt"
    lines.write_text("a\nb\n")
    encode_corpus(codec, FileTexts(str(lines)), tmp_path / "c", SHA)
    lines.write_text("a\nc\n")
    calls.clear()
    made = encode_corpus(codec, FileTexts(str(lines)), tmp_path / "c", SHA)
    assert calls == [2]
    assert made.texts([0, 1]) == ["a", "c"]


@pytest.mark.parametrize("halt", [KeyboardInterrupt, MemoryError])
def test_a_halted_encoding_goes_on_where_it_was(codec, tmp_path, calls, monkeypatch, halt, capsys):
    out, source = tmp_path / "c", GivenTexts([*TEXTS[:20], LONG, *TEXTS[20:]])
    whole = files_of(encode_corpus(codec, source, tmp_path / "whole", SHA).folder)
    counted = codec.encode_ids

    def halted(ids):
        if len(calls) == 2:
            raise halt
        return counted(ids)

    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode_ids", halted)
        with pytest.raises(halt):
            encode_corpus(codec, source, out, SHA)
    assert not out.exists()
    # What a kill in the middle of a write leaves is cut off.
    for name in ("codes.npy", "ends.npy", "rows.npy", "texts.jsonl"):
        with open(tmp_path / ".c.build" / "corpus" / name, "ab") as file:
            file.write(b"torn")
    calls.clear()
    encode_corpus(codec, source, out, SHA)
    assert "going on after 32 texts" in capsys.readouterr().err
    assert sum(calls) == len(TEXTS) + 1 - 32
    assert files_of(out) == whole
    assert not (tmp_path / ".c.build").exists()


def test_what_a_halted_encoding_of_other_texts_left_is_dropped(codec, tmp_path, monkeypatch):
    def halted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode_ids", halted)
        with pytest.raises(KeyboardInterrupt):
            encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    made = encode_corpus(codec, GivenTexts(LINES[50:53]), tmp_path / "c", SHA)
    assert made.texts([0, 1, 2]) == LINES[50:53]


def test_what_lies_there_and_is_no_corpus_is_left_alone(codec, tmp_path, calls):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_anna.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("letters", "file"):
        with pytest.raises(UserError, match=f"{name} is there, and is no encoded corpus"):
            encode_corpus(codec, GivenTexts(TEXTS), tmp_path / name, SHA)
    assert calls == []
    assert (tmp_path / "letters" / "to_anna.txt").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "letters"]


def test_no_text_that_fits_leaves_nothing(codec, tmp_path):
    for texts in ([], [LONG]):
        with pytest.raises(UserError, match="texts holds no text of up to 40 tokens"):
            encode_corpus(codec, GivenTexts(texts), tmp_path / "c", SHA)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_is_done(codec, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_whole", full)
        with pytest.raises(UserError, match=r"no space left for .*c: make room and run the same"):
            encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    assert (tmp_path / ".c.build").is_dir()
    assert len(encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)) == len(TEXTS)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("place", ["note", "codes"])
def test_storage_that_fails_keeps_what_is_done(
    codec, tmp_path, calls, monkeypatch, number, place, capsys
):
    whole = files_of(encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "whole", SHA).folder)
    write, append = writer.write_whole, writer._Array.append
    calls.clear()

    def fail(*args):
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        return (write if place == "note" else append)(*args)

    with monkeypatch.context() as patch:
        target = (writer, "write_whole") if place == "note" else (writer._Array, "append")
        patch.setattr(*target, fail)
        with pytest.raises(UserError if number == errno.EACCES else StorageError) as caught:
            encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    assert "the same command" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    assert "going on after 16 texts" in capsys.readouterr().err
    assert files_of(tmp_path / "c") == whole


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN])
def test_a_note_that_cannot_be_read_is_no_reason_to_begin_anew(
    codec, tmp_path, calls, monkeypatch, number
):
    def halted(*_):
        raise KeyboardInterrupt

    Weather(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "finish", halted)
        with pytest.raises(KeyboardInterrupt):
            encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    note, read = tmp_path / ".c.build" / "done.json", Path.read_text
    before = note.read_text()

    def fail(path, *args, **more):
        if path == note:
            raise OSError(number, os.strerror(number))
        return read(path, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        with pytest.raises(StorageError, match=r"done\.json: the storage fails"):
            encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    assert note.read_text() == before
    calls.clear()
    assert len(encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)) == len(TEXTS)
    assert calls == []


def test_what_a_kill_left_at_the_very_end_is_encoded_anew(codec, tmp_path, monkeypatch):
    whole = files_of(encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "whole", SHA).folder)
    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "forget", lambda _: None)
        patch.setattr("t5vae.common.workfolder._clear", lambda *_, **__: None)
        encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    assert (tmp_path / ".c.build" / "done.json").exists()
    shutil.rmtree(tmp_path / "c")
    encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    assert files_of(tmp_path / "c") == whole


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_do(codec, tmp_path, monkeypatch, number):
    without_locks(monkeypatch, number)
    assert len(encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)) == len(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("begin", [0, 9_000])
def test_a_file_that_fails_for_a_while_is_read_on(tmp_path, monkeypatch, begin):
    monkeypatch.setattr("shards.write.streams.CHUNK", 1000)
    weather = Weather(monkeypatch)
    lines = [f"{line} {number}" for number in range(30) for line in LINES]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    weather.strike("a.txt", errno.EIO, errno.ESTALE, begin=begin)
    assert texts_of(FileTexts(str(tmp_path / "a.txt"))) == lines
    weather.strike("a.txt", -errno.EIO, begin=begin)
    with pytest.raises(StorageError, match=r"a\.txt: the storage fails"):
        FileTexts(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_encoded_corpus_that_does_not_answer_is_not_damaged(
    codec, tmp_path, monkeypatch, number
):
    encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    weather, left, load = Weather(monkeypatch), [number] * 2, np.memmap

    def fail(*args, **more):
        if left:
            raise OSError(left.pop(), "away")
        return load(*args, **more)

    monkeypatch.setattr(np, "memmap", fail)
    weather.strike("texts.jsonl", number)
    assert Corpus.open(tmp_path / "c", SHA).texts([3, 1]) == [TEXTS[3], TEXTS[1]]
    left += [number] * 1000
    with pytest.raises(StorageError, match=r"codes\.npy: the storage fails"):
        Corpus.open(tmp_path / "c", SHA)
    left[:] = [errno.EACCES]
    with pytest.raises(UserError, match=r"cannot read .*c: away"):
        Corpus.open(tmp_path / "c", SHA)


@pytest.mark.parametrize("name", ["codes.npy", "ends.npy", "rows.npy", "texts.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_damaged_corpus_says_what_to_do(codec, tmp_path, name, damage):
    encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    path = tmp_path / "c" / name
    path.unlink() if damage == "gone" else os.truncate(path, 100 if damage == "cut" else 0)
    with pytest.raises(UserError, match=r"c is damaged .*: remove it"):
        Corpus.open(tmp_path / "c", SHA)


def test_other_folders_and_other_models_are_refused(codec, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "corpus.json").write_text('{"format_ver')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "corpus.json").write_text("[]")
    for name in ("nowhere", "empty", "torn", "list"):
        with pytest.raises(UserError, match=f"{name} is no encoded corpus"):
            Corpus.open(tmp_path / name, SHA)
    encode_corpus(codec, GivenTexts(TEXTS), tmp_path / "c", SHA)
    with pytest.raises(UserError, match="encoded by another model"):
        Corpus.open(tmp_path / "c", "abd")


@pytest.mark.parametrize(
    ("name", "column", "content", "rows"),
    [
        ("t.txt", None, "a\nb\n\nc", [0, 1, 3]),
        ("t.txt.gz", None, "a\nb\nc\n", [0, 1, 2]),
        ("t.jsonl", "s", "".join(json.dumps({"n": 1, "s": s}) + "\n" for s in "abc"), [0, 1, 2]),
        ("t.csv", "s", "n,s\n1,a\n2,b\n3,\n4,c\n", [0, 1, 3]),
    ],
)
def test_files_of_every_format_are_read_and_their_rows_known(tmp_path, name, column, content, rows):
    path = tmp_path / name
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    source = FileTexts(str(path), column)
    assert source.total == 3
    assert source.skipped == ({"empty": 1} if rows[-1] == 3 else {})
    assert list(source.chunks(0)) == [(rows, ["a", "b", "c"])]
    assert list(source.chunks(2)) == [(rows[2:], ["c"])]


@pytest.mark.parametrize(
    ("name", "column", "content", "message"),
    [
        ("none.txt", None, None, "none.txt"),
        ("t.jsonl", None, b'{"s": "a"}\n', "column"),
        ("t.jsonl", "text", b'{"s": "a"}\n', "text"),
        ("t.txt", "s", b"a\n", "column"),
        ("t.txt", None, b"a\n\xff\xfe\n", "t.txt"),
        ("t.csv", "s", b"\x00\x01\x02", "t.csv"),
        ("t.csv", "s", b"", "t.csv"),
        ("-", "s", None, "leave --column out, or give a file"),
        ("/dev/fd/977", "s", None, "leave --column out, or give a file"),
        ("/dev/fd/977", None, None, "cannot read /dev/fd/977: No such file"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, column, content, message):
    path = name if content is None and name[0] in "-/" else tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(FileTexts(str(path), column).chunks(0))
    assert "\n" not in str(caught.value)


def test_a_split_or_a_share_of_it(tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n")
    shards.build(tmp_path / "lines.txt", tmp_path / "data", tokenizer="byte", max_length=40)
    dataset = shards.open_dataset(str(tmp_path / "data"))
    fitting = {text for text in LINES if len(text.encode()) < 40}
    whole = texts_of(SplitTexts(dataset, "train"))
    valid = texts_of(SplitTexts(dataset, "valid"))
    assert len(whole) + len(valid) == len(fitting)
    assert {*whole, *valid} == fitting
    some = SplitTexts(dataset, "train", 20)
    texts = texts_of(some)
    assert some.total == len(texts) == 20
    assert set(texts) < set(whole)
    assert texts_of(some, 7) == texts[7:]
    rows = [row for rows, _ in some.chunks(0) for row in rows]
    assert dataset.texts("train", rows) == texts
    assert some.describe() != SplitTexts(dataset, "train", 19).describe()
